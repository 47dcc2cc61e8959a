"""What the hooks of one transformer share: whose tokens are kept, how many, and at which noise level."""

import math
from collections.abc import Iterable
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from . import ops
from .methods.base import Method
from .methods.memory import RunMemory
from .models import Conditioning, ModelAdapter
from .reconstruct import IDENTITY, LAST, NEAREST
from .selection.budget import default_tile

_DENSE = 1 << 24  # ratios as integers: torch.compile keeps these exact and static


class Selector(Protocol):
    """Anything that can choose tokens: a trained artefact, or a baseline."""

    def ratios(self, sigma: float) -> tuple[float, ...]:
        """Share of tokens that each layer keeps at noise level sigma, 1 for a dense layer."""

    def scores(self, layer: int, x: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        """Scores [B,N] of the tokens x [B,N,D] at the entry of a layer."""


class SelectionState:
    """What the hooks of one transformer share. It is set anew for every call; only ``memory`` outlives one.

    Attributes:
        tile: token counts are rounded to multiples of it; None is the sequence's :func:`default_tile`.
        batched_guidance: whether the batch is (unconditional, conditional), which then keep the same tokens.
        sigma: noise level of the coming call if a scheduler or :meth:`at` announced it, else None.
        fixed: whether :meth:`at` fixed it, so that the call's own timesteps do not count.
        watch: the pipeline's :class:`~shiva_ext.scheduler_watch.SchedulerWatch`, if there is one.
        active: False makes every hook a plain call of the model (the dense teacher's run).
        captured: a dict to collect each hooked block's (input, output) tokens in while not active, else None.
        trainer: takes over a pruned block while training, see ``training/stages.py``.
        branch: while calls have one half of a guided batch alone, which samples those are.
        fused: whether blocks that have a fused form run in it.
        wrapped: why blocks of the last call that was not compiled ran wrapped all the same, by layer.
        method: does more than choose tokens, see :class:`~shiva_ext.methods.Method`; None for a selector.
        memory: what is carried from step to step of a run, for the few methods and options that do.
        grid: height and width of this call's image in tokens, where a method wants them.
        plan: what a block's modules merge or run instead while it runs, by site.
        scratch: what a method's blocks leave for each other in one call.
        skipped: layers that this call leaves out: skip-layer guidance.
        reconstruct: what rejected tokens get, see :mod:`shiva_ext.reconstruct`.
        kept: while a block runs on some of its tokens: which they are [B,k], and of how many.
        chosen: for groups of layers that select together, the first of them and its indices [B,k].
        records: per call while recording, ``{"timestep", "kept": {layer: [B,k]}, "sites": {layer: names}}``; a method
            that merges names its sites. Beside TeaCache and GuidanceCache also ``"rows"``, the samples [b] whose
            tokens they are, where it ran some alone, and nothing is kept where it ran none.
    """

    def __init__(
        self,
        selector: Selector,
        adapter: ModelAdapter,
        tile: int | None = None,
        batched_guidance: bool = False,
        fused: bool = True,
        reconstruct: str = IDENTITY,
    ):
        self.selector, self.adapter, self.fused = selector, adapter, fused
        self.reconstruct = reconstruct
        self.method: Method | None = getattr(selector, "method", None)
        self.memory, self.plan, self.scratch = RunMemory(), {}, {}
        self.skipped: tuple[int, ...] = ()
        self.grid: tuple[int, int] | None = None
        self.wrapped: dict[int, str] = {}
        self.tile, self.batched_guidance = tile, batched_guidance
        self.active, self.trainer = True, None
        self.captured: dict[int, tuple[Tensor, Tensor]] | None = None
        self.sigma: float | None = None
        self.fixed, self.watch = False, None
        self.recording, self.records = False, []
        self.entry: dict | None = None
        self.quota: tuple[int, ...] = ()
        self.conditioning: Conditioning | None = None
        self.guided = False
        self.branch: slice | None = None
        self.kept: tuple[Tensor, int] | None = None
        self.chosen: dict[int, tuple[int, Tensor]] = {}

    def at(self, sigma: float, fixed: bool = False) -> None:
        """Announce the noise level of the coming calls, as a Python number that torch.compile can rely on."""
        if not 0 <= sigma <= 1:
            raise ValueError(f"shiva_ext: sigma is {sigma}, wanted a noise level in [0, 1] (timestep / 1000)")
        self.sigma, self.fixed = float(sigma), fixed
        self.quota = tuple(
            _DENSE if ratio >= 1 else math.floor(ratio * _DENSE) + 1 for ratio in self.selector.ratios(self.sigma)
        )

    def forget(self) -> None:
        """No level is announced any more."""
        self.sigma, self.quota, self.fixed = None, (), False

    def check_guidance(self, guides: bool) -> None:
        """Refuse to guide what has learned to give the guided output by itself.

        Raises:
            ValueError: it would be guided twice.
        """
        scale = getattr(self.selector, "guidance", 0)
        if guides and scale:
            raise ValueError(
                f"shiva_ext: the artefact was trained to give the output guided at scale {scale:g} in one call, and "
                "the pipeline guides it again; call it with guidance_scale=1"
            )

    @property
    def stateful(self) -> str | None:
        """What carries tensors from step to step, if anything does."""
        if self.method is not None:
            return type(self.method).__name__ if self.method.stateful else None
        return f"reconstruct={LAST!r}" if self.reconstruct == LAST else None

    @property
    def progress(self) -> float:
        """Share of the run's steps that are done; from the noise level where no scheduler tells."""
        levels = [] if self.watch is None else self.watch.levels
        if not levels:
            return 1 - self.sigma
        return sum(level > self.sigma + 1e-6 for level in levels) / len(levels)

    @property
    def wants_grid(self) -> bool:
        """Whether rows and columns of the image matter."""
        return (self.method is not None and self.method.needs_grid) or self.reconstruct == NEAREST

    def read_sigma(self, timestep: Tensor) -> None:
        """Take the noise level from a call's timesteps [B], unless they are those of the announced level."""
        values = [t / 1000 for t in timestep.detach().flatten().tolist()]
        if not values:
            raise ValueError("shiva_ext: timestep is empty, wanted one noise level per sample")
        low, high = min(values), max(values)
        if high - low > 1e-4:
            raise ValueError(
                f"shiva_ext: the samples of one call have noise levels from {low:.4f} to {high:.4f}, but they share "
                "one token count per layer; call the model once per level, or fix it with handle.at(sigma)"
            )
        level = min(max(low, 0.0), 1.0)
        rounding = torch.finfo(timestep.dtype).eps if timestep.is_floating_point() else 0
        if self.sigma is None or abs(level - self.sigma) > rounding * level:
            self.at(level)

    def tokens(self, layer: int, N: int) -> int:
        """How many of N tokens a layer keeps: floor(N * ratio), to the nearest multiple of the tile, never 0."""
        quota = self.quota[layer]
        if quota >= _DENSE:
            return N
        k = (N * quota) >> 24
        tile = default_tile(N) if self.tile is None else self.tile
        if tile > 1:
            lower = k // tile * tile
            upper = min(lower + tile, N)
            k = lower if lower and k - lower < upper - k else upper
        return max(k, 1)

    def new_run(self) -> None:
        """A run begins or is over: nothing is carried on."""
        self.memory.reset()

    @contextmanager
    def running(self, kept: Tensor | None, N: int):
        """A block runs on these of its N tokens; None is all."""
        self.kept = None if kept is None else (kept, N)
        try:
            yield
        finally:
            self.kept = None

    @contextmanager
    def rows(self, rows: Tensor):
        """Blocks run on these samples of the batch, int64 [b], alone."""
        if self.entry is not None:
            self.entry["rows"] = rows.cpu()
        whole = self.conditioning
        self.conditioning = None if whole is None else Conditioning(*(each.index_select(0, rows) for each in whole))
        try:
            yield
        finally:
            self.conditioning = whole

    @contextmanager
    def half(self, rows: slice):
        """Calls have these samples of a guided batch, one of its halves, and no guidance."""
        self.branch = rows
        try:
            yield
        finally:
            self.branch = None

    def group(self, layer: int) -> int | None:
        """Layers of one group select once, for all of them; None selects for itself."""
        return self.selector.group(layer) if hasattr(self.selector, "group") else None

    def choosing(self, layers: Iterable[int]) -> list[int]:
        """Those of the layers, in their order, that select tokens: the first of each group."""
        groups, found = set(), []
        for layer in layers:
            group = self.group(layer)
            if group is None or group not in groups:
                found.append(layer)
            groups.add(group)
        return found

    def select(self, layer: int, x: Tensor, k: int) -> Tensor:
        """Indices [B,k] of the tokens of x [B,N,D] that a layer keeps, ascending."""
        group = self.group(layer)
        first, kept = self.chosen.get(group, (layer, None))
        if first == layer:  # also when gradient checkpointing runs it again
            kept = self._choose(layer, x, k)
        if group is not None:
            self.chosen[group] = first, kept
        if self.entry is not None:
            self.entry["kept"][layer] = kept.detach().cpu()
        return kept

    def _choose(self, layer: int, x: Tensor, k: int) -> Tensor:
        scores = self.selector.scores(layer, x, self.sigma, self.conditioning)
        if self.guided:
            # Shiva-DiT (arXiv 2602.05605), eq. 32: both halves keep what either of them needs most.
            if x.shape[0] % 2:
                raise ValueError(f"shiva_ext: {odd_batch(x.shape[0])}")
            unified = torch.maximum(*scores.chunk(2))
            return ops.topk_select(unified.detach(), k)[0].repeat(2, 1)
        return ops.topk_select(scores.detach(), k)[0]

    def resume(self, call: dict, block, *args):
        """Run a block with the attributes that belong to an earlier call of the transformer."""
        now = {name: getattr(self, name) for name in call}
        vars(self).update(call)
        try:
            return block(*args)
        finally:
            vars(self).update(now)

    @contextmanager
    def kept_for_checkpoints(self, module: nn.Module):
        """Gradient checkpointing runs blocks again in the backward pass; let them find this call's attributes there."""
        checkpoint = vars(module).get("_gradient_checkpointing_func")
        if checkpoint is None or not torch.is_grad_enabled():
            yield
            return
        names = ("active", "sigma", "quota", "conditioning", "guided", "chosen", "trainer", "entry", "scratch")
        call = {name: getattr(self, name) for name in names}
        module._gradient_checkpointing_func = lambda block, *args: checkpoint(partial(self.resume, call, block), *args)
        try:
            yield
        finally:
            module._gradient_checkpointing_func = checkpoint


def odd_batch(B: int) -> str:
    """What to say of a batch of B samples that has no two halves."""
    return (
        f"batched guidance is on, but the batch has {B} samples, wanted an even number; enable with "
        "batched_guidance=False for a model called without guidance"
    )
