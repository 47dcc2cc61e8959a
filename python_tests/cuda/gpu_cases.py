"""What the tests of this folder share: an op's case whose tensors stay where they are, and inputs on the GPU."""

import torch
from ops.cases import OPS, Maker, Size, floating, native, tuple_of
from torch import Tensor

import shiva_ext.ops  # noqa: F401  (defines the ops)

GPU = torch.device("cuda")
CLOSE = dict(rtol=1e-4, atol=1e-4)  # of a whole transformer in float32


def on_gpu(inputs: dict) -> dict:
    return {name: a.to(GPU) if torch.is_tensor(a) else a for name, a in inputs.items()}


class Case:
    """An op's arguments and incoming gradients in fixed places, which new values can be written into.

    Args:
        key: of ops.cases.OPS.
        size, dtype, layout, device: of its tensors.
    """

    def __init__(self, key: str, size: Size, dtype: torch.dtype, layout="contiguous", device=GPU):
        self.op, self.size, self.dtype, self.layout, self.device = OPS[key], size, dtype, layout, device
        self.arguments, self.gradients = self.values(seed=0)

    def values(self, seed: int) -> tuple[dict, list[Tensor]]:
        """Fresh arguments, and gradients of the outputs if the op has any."""
        maker = Maker(self.size, self.dtype, "random", self.layout, seed, device=self.device)
        arguments = self.op.arguments(maker)
        if not self.op.leaves:
            return arguments, []
        return arguments, maker.gradients(tuple_of(native(self.op)(*arguments.values())), "random")

    def fill(self, values: tuple[dict, list[Tensor]]) -> None:
        """Write new values into the case's own tensors, on the current stream."""
        arguments, gradients = values
        for name, value in arguments.items():
            if torch.is_tensor(value):
                self.arguments[name].copy_(value)
        for own, value in zip(self.gradients, gradients, strict=True):
            own.copy_(value)

    def run(self) -> list[Tensor]:
        """The outputs, and the gradients of the op's leaves."""
        arguments, leaves = self.op.split(self.arguments)
        outputs = tuple_of(native(self.op)(*arguments.values()))
        gradients = torch.autograd.grad(floating(outputs), leaves, self.gradients) if leaves else ()
        return [*(out.detach() for out in outputs), *gradients]
