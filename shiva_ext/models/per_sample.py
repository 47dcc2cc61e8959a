"""Blocks whose positions are one table for the whole batch run once for each sample, as each keeps other tokens."""

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .base import ModelAdapter
from .fused import FusedForm


def each_sample(
    run: Callable[[dict, Tensor], tuple],
    arguments: dict,
    kept: Tensor,
    split: Sequence[str],
    own: Callable[[int], dict],
) -> tuple:
    """``run(arguments, kept)`` for one sample after the other; the parts of its outputs are put together again.

    Args:
        run: gets the arguments of one sample and its kept tokens [1,k].
        arguments: of the block, by name.
        kept: [B,k].
        split: names of the arguments whose rows belong to samples; B rows, or a multiple of it in as many halves. A
            single row is for all of them.
        own: further arguments of sample b.
    """
    B = len(kept)
    outputs = []
    for b in range(B):
        given = {name: arguments[name] for name in split if arguments.get(name) is not None}
        rows = {name: value if len(value) == 1 else value[b::B] for name, value in given.items()}
        outputs.append(run({**arguments, **rows, **own(b)}, kept[b : b + 1]))
    return outputs[0] if B == 1 else tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))


class PerSampleAdapter(ModelAdapter):
    """A family whose pruned blocks run once for each sample."""

    @abstractmethod
    def each_sample(self, run: Callable[[dict, Tensor], tuple], arguments: dict, kept: Tensor) -> tuple:
        """:func:`each_sample` with what belongs to this family's samples; kept [B,k]."""

    def call(self, forward, tokens: Tensor, args: tuple, kwargs: dict, kept: Tensor | None = None):
        arguments = {**self.bind(forward, args, kwargs), self.image_argument: tokens}
        if kept is None:
            return forward(**arguments)
        return self.each_sample(lambda own, _: forward(**own), arguments, kept)

    def call_fused(self, form: FusedForm, block: nn.Module, x: Tensor, kept: Tensor, arguments: dict):
        def run(own: dict, own_kept: Tensor):
            return form.run(block, own[self.image_argument], own_kept, own)

        return self.each_sample(run, {**arguments, self.image_argument: x}, kept)
