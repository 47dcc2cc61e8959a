"""GuidanceCache: between two steps that compute it, what guidance adds is taken from the first of them."""

from dataclasses import dataclass, replace

import torch
from diffusers.hooks import ModelHook
from torch import Tensor, nn

from ..selection_state import odd_batch
from .base import Cache, CachedTransformerHook
from .state import CacheState

REUSED = ("guidance",)


@dataclass(frozen=True)
class GuidanceCache(Cache):
    """The unprompted half of a guided batch at some steps only; the others run the prompted half alone.

    The two halves' difference, which guidance scales, changes slowly along a run. At a step that leaves the unprompted
    half out, its output is the prompted one's less the difference at the last step that computed both: such a step
    costs half. (FasterCache, arXiv 2410.19355, has the idea, and weighs the difference by frequency;
    here it is taken as it was.)

    For families that guide with one call for both prompts, and pipelines that do guide. The prompted half's output is
    exact at every step.

    Attributes:
        every: after the first steps, every so many-th computes both halves; 1 leaves nothing out.
        first: steps at the beginning of a run that compute both.
        steps: of a run, see :class:`Cache`.

    One call stores half an output, [B/2,C,H,W] in its dtype. Runs without guidance raise ValueError.
    """

    every: int = 3
    first: int = 2
    steps: int | None = None

    def __post_init__(self):
        if self.every < 1 or self.first < 1:
            raise ValueError(
                f"GuidanceCache: every is {self.every} and first {self.first}, wanted at least 1: the first step has "
                "nothing to take from"
            )

    def begin_step(self, step: int, steps: int) -> tuple[str, ...]:
        return REUSED if step >= self.first and (step - self.first + 1) % self.every else ()

    def computed(self, steps: int) -> int:
        """How many of a run's steps compute both halves."""
        return sum(not self.begin_step(step, steps) for step in range(steps))

    def attach(self, transformer: nn.Module, state: CacheState) -> list[tuple[nn.Module, ModelHook]]:
        if not state.adapter.guides_in_batch:
            raise TypeError(
                f"shiva_ext: GuidanceCache leaves out half of a guided batch, and pipelines of "
                f"{type(transformer).__name__} guide in two calls or not at all; use another cache, such as FORA"
            )
        return []

    def transformer_hook(self, state: CacheState, hooks: list[ModelHook]) -> "GuidanceHook":
        hook = GuidanceHook(state)
        state.stores.append(vars(hook.kept))
        return hook

    def check_selection(self, selection) -> None:
        if selection.stateful is not None:
            raise ValueError(
                f"shiva_ext: {selection.stateful} carries tensors from step to step for the whole batch, and "
                "GuidanceCache runs half of it at some steps; use SmoothCache or FORA"
            )

    def memory_bound(self, layers: int, B: int, N: int, T: int, D: int) -> int:
        # An output has no more numbers than the tokens it is made of.
        return B // 2 * N * D


class _Kept:
    """Differences by call: attributes, which a compiler writes without looking."""


class GuidanceHook(CachedTransformerHook):
    """On the whole transformer: runs it on both halves of the batch, or on the prompted one."""

    def __init__(self, state: CacheState):
        super().__init__(state)
        self.kept = _Kept()

    def run(self, module: nn.Module, forward, args: tuple, kwargs: dict):
        state, selection = self.state, self.state.selection
        if state.bypass:
            return forward(*args, **kwargs)
        if not state.guided:
            if vars(self.kept):  # guidance has ended within the run
                return forward(*args, **kwargs)
            raise ValueError(
                "shiva_ext: GuidanceCache leaves out half of a guided batch, and this call has no guidance; give the "
                "pipeline a guidance_scale, or batched_guidance=True to enable where a transformer is called with "
                "both halves by hand"
            )
        call, shape, *_ = state.key
        B, name = shape[0], str(call)
        if B % 2:
            raise ValueError(f"shiva_ext: {odd_batch(B)}")
        first = state.adapter.prompted_first
        rows = slice(0, B // 2) if first else slice(B // 2, B)
        # A step that computes does not look, so that a compiler makes one graph for all of them.
        key, difference = getattr(self.kept, name, (None, None)) if state.planned else (None, None)
        reuses = key == state.key
        if not torch.compiler.is_compiling():
            state.computed, state.reused = state.computed + (not reuses), state.reused + reuses
        if not reuses:
            output = forward(*args, **kwargs)
            prompted, other = output[0].chunk(2) if first else reversed(output[0].chunk(2))
            setattr(self.kept, name, (state.key, (prompted - other).detach()))
            return output
        args, kwargs = narrowed((args, kwargs), rows, B)
        if selection is None:
            output = forward(*args, **kwargs)
        else:
            with selection.half(rows):
                output = forward(*args, **kwargs)
        other = output[0] - difference
        sample = torch.cat([output[0], other] if first else [other, output[0]])
        return (sample, *output[1:]) if isinstance(output, tuple) else replace(output, sample=sample)


def narrowed(value, rows: slice, B: int):
    """Some samples of all tensors [B,...] in nested tuples, lists and dicts; anything else as it is."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and len(value) == B else value
    if type(value) is dict:
        return {name: narrowed(each, rows, B) for name, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(narrowed(each, rows, B) for each in value)
    return value
