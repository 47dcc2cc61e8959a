"""What a cache has to know of a model, from runs without it."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from diffusers.hooks import ModelHook
from torch import Tensor, nn

from ..api import enable, find_transformer
from .base import Cache
from .file import SmoothCacheFile, TeaCacheFile
from .fit import Fit
from .schedule import Rows, make_schedule
from .smoothcache import Scheduled, SiteHook
from .state import CacheState
from .teacache import Stack, StackHook, TeaCache

SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)  # of the calls that are reused, for which thresholds are listed
_GRID = 256  # places where a fitted polynomial is looked at
_HALVINGS = 40


class TooFewRuns(ValueError):
    """Nothing can be fitted to what was recorded."""


def _same_length(before: int | None, steps: int) -> int:
    """The steps of all runs."""
    if before not in (None, steps):
        raise ValueError(f"shiva calibrate: got runs of {before} and of {steps} steps, wanted all alike")
    return steps


# ---------------------------------------------------------------------------------------------------------- TeaCache


@dataclass(frozen=True)
class _StackRecorder(Cache):
    """Computes everything, and records how indicator and residual change from step to step.

    Attributes:
        changes: of each image of each run, by step: (change of the indicator, change of what the blocks add).
    """

    steps: int | None = None
    changes: dict[tuple, list[tuple[float, float]]] = field(default_factory=dict)
    place: list = field(default_factory=lambda: [0, None])  # run, and its number of steps

    def attach(self, transformer: nn.Module, state: CacheState) -> list[tuple[nn.Module, ModelHook]]:
        stack = _RecordingStack(self, state)
        state.stores.append(stack.values)
        blocks = state.adapter.blocks(transformer)
        return [(block, StackHook(stack, i, i == len(blocks) - 1)) for i, block in enumerate(blocks)]

    def begin_step(self, step: int, steps: int) -> tuple:
        self.place[0] += step == 0
        self.place[1] = _same_length(self.place[1], steps)
        return ()

    def memory_bound(self, layers: int, B: int, N: int, T: int, D: int) -> int:
        return 2 * B * N * D


class _RecordingStack(Stack):
    def __init__(self, recorder: _StackRecorder, state: CacheState):
        super().__init__(TeaCache(0.0, "identity"), (1.0, 0.0), state)
        self.recorder = recorder

    def decide(self, block: nn.Module, x: Tensor, arguments: dict) -> None:
        mine, images = self.values.setdefault(self.state.key, {}), self.images(x)
        m = self.state.adapter.modulated_input(block, x, arguments)
        before, mine["indicator"] = mine.get("indicator"), m
        mine["change"] = None if before is None else self.changes(m, before, images)
        self.entry, self.rows = x, None

    def finish(self, output: Tensor) -> Tensor:
        mine = self.values[self.state.key]
        added, before = output - self.entry, mine.get("added")
        mine["added"] = added
        if mine["change"] is not None:
            moved = self.changes(added, before, self.images(output))
            for image, pair in enumerate(zip(mine["change"], moved, strict=True)):
                place = (self.recorder.place[0], self.state.key[0], image)
                self.recorder.changes.setdefault(place, []).append(pair)
        self.entry = None
        return output


def fit_polynomial(
    pairs: Sequence[tuple[float, float]], degree: int = 4
) -> tuple[tuple[float, ...], tuple[float, float], float]:
    """The output's change as a polynomial of the indicator's, by least squares.

    Of the degrees up to ``degree`` the highest whose polynomial is not negative between the least and the largest
    change that was seen; outside of them it means nothing.

    Args:
        pairs: (change of the indicator, change of the output), at least ``degree + 1``.

    Returns:
        coefficients, highest power first; least and largest change; share of the variance that is explained.

    Raises:
        TooFewRuns: there are too few finite pairs, or they are all at one place.
    """
    found = np.array([pair for pair in pairs if np.isfinite(pair).all()], dtype=np.float64).reshape(-1, 2)
    x, y = found.T
    different = len(np.unique(x))
    if different <= max(degree, 1):
        raise TooFewRuns(
            f"shiva calibrate teacache: got {len(found)} changes between steps, {different} of them different, wanted "
            f"more than {max(degree, 1)}; make more runs or steps, or ask for a lower degree"
        )
    bounds = float(x.min()), float(x.max())
    grid = np.linspace(*bounds, _GRID)
    for power in range(degree, -1, -1):
        coefficients = np.polyfit(x, y, power)
        if np.polyval(coefficients, grid).min() >= 0:
            break
    left = ((y - np.polyval(coefficients, x)) ** 2).sum()
    whole = ((y - y.mean()) ** 2).sum()
    r2 = 1.0 if whole == 0 else float(1 - left / whole)
    return tuple(map(float, coefficients)), bounds, r2


def reused_share(
    cache: TeaCache, coefficients: tuple[float, ...], changes: Sequence[Sequence[float]], steps: int
) -> float:
    """Share of the calls that a threshold would reuse, if a reused step changed nothing in those that follow."""
    reused = calls = 0
    for sequence in changes:
        total, calls = 0.0, calls + len(sequence) + 1
        for step, change in enumerate(sequence, start=1):
            total += cache.expected(coefficients, change)
            if step < cache.first or step >= steps - cache.last or not total < cache.threshold:
                total = 0.0
            else:
                reused += 1
    return reused / max(calls, 1)


def _least(reaches: Callable[[float], bool], high: float) -> float:
    """The least number up to ``high`` from which on something holds."""
    low = 0.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high


def calibrate_teacache(
    pipe_or_transformer,
    run: Callable[[], object],
    *,
    steps: int | None = None,
    share: float = 0.5,
    degree: int = 4,
    batched_guidance: bool | None = None,
) -> TeaCacheFile:
    """Fit TeaCache's polynomial to a model, and find thresholds for several shares of reused calls.

    Args:
        pipe_or_transformer: as for ``enable``; what else is enabled on it (a selection) counts as part of the model.
        run: makes whole runs of the sampler with the production's steps and guidance; dozens of prompts are wanted.
        steps: of a run, for a transformer without a pipeline.
        share: of the calls that the default threshold reuses, in (0, 1).
        degree: of the polynomial, at most.
        batched_guidance: as for ``enable``.

    Raises:
        ValueError: ``share`` is out of range, or too little was recorded.
    """
    if not 0 < share < 1:
        raise ValueError(f"shiva calibrate teacache: share is {share}, wanted one in (0, 1)")
    transformer = find_transformer(pipe_or_transformer)
    recorder = _StackRecorder(steps=steps)
    with enable(pipe_or_transformer, recorder, batched_guidance=batched_guidance), torch.no_grad():
        run()
    steps = recorder.place[1]
    pairs = [pair for changes in recorder.changes.values() for pair in changes]
    coefficients, bounds, r2 = fit_polynomial(pairs, degree)
    sequences = [[x for x, _ in changes] for changes in recorder.changes.values()]
    probe = TeaCache(0.0, coefficients, bounds)
    expected = [[probe.expected(coefficients, x) for x in sequence if math.isfinite(x)] for sequence in sequences]
    most = max(map(sum, expected)) + 1

    def share_of(threshold: float) -> float:
        return reused_share(TeaCache(threshold, coefficients, bounds), coefficients, sequences, steps)

    reachable = share_of(most)
    wanted = sorted({*SHARES, share})
    thresholds = {each: _least(lambda t, s=each: share_of(t) >= s, most) for each in wanted if each <= reachable}
    if share not in thresholds:
        raise ValueError(
            f"shiva calibrate teacache: runs of {steps} steps can reuse {reachable:.0%} of the calls at most, got "
            f"share {share}"
        )
    fit = Fit.of(transformer, getattr(pipe_or_transformer, "scheduler", None), steps)
    kept = tuple((round(x, 6), round(y, 6)) for x, y in pairs)
    return TeaCacheFile(coefficients, bounds, r2, thresholds, thresholds[share], fit, kept)


# ------------------------------------------------------------------------------------------------------- SmoothCache


@dataclass(frozen=True)
class _SiteRecorder(Scheduled):
    """Computes everything, and records how modules' outputs change over one and more steps.

    Attributes:
        max_lag: steps to look back.
        errors: by kind, lag and step: of each call its samples' mean.
    """

    max_lag: int = 3
    steps: int | None = None
    errors: dict[tuple[str, int, int], list[float]] = field(default_factory=dict)
    place: list = field(default_factory=lambda: [None])

    def begin_step(self, step: int, steps: int) -> tuple:
        self.place[0] = _same_length(self.place[0], steps)
        return ()

    def attach(self, transformer: nn.Module, state: CacheState) -> list[tuple[nn.Module, ModelHook]]:
        sites = super().attach(transformer, state)
        return [(module, _RecordingSite(self, state, hook.kind, hook.parts)) for module, hook in sites]


class _RecordingSite(SiteHook):
    def __init__(self, recorder: _SiteRecorder, state: CacheState, kind: str, parts: tuple[str, ...]):
        super().__init__(state, kind, parts)
        self.recorder = recorder

    def new_forward(self, module: nn.Module, *args, **kwargs):
        output = self.fn_ref.original_forward(*args, **kwargs)
        state = self.state
        # Prompts change little from step to step; what counts is the image.
        if state.bypass or self.parts[0] == "text":
            return output
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        now = (output[0] if isinstance(output, tuple) else output).detach()
        kept, total = self._chosen(len(x))
        places = self._places(len(x))
        past = self._stored(places) or ()
        size = now.float().abs().flatten(1).sum(1).clamp(min=torch.finfo(torch.float32).tiny)
        for lag, before in enumerate(past, start=1):
            before = self._restored((before,), x, kept, total)
            error = (before.float() - now.float()).abs().flatten(1).sum(1) / size
            of = self.kind, lag, state.step - lag
            self.recorder.errors.setdefault(of, []).append(error.mean().item())
        whole = self._whole((now,), past[:1] or (None,), kept, total)
        self._store(places, (*whole, *past)[: self.recorder.max_lag])
        return output


def calibrate_smoothcache(
    pipe_or_transformer,
    run: Callable[[], object],
    *,
    alpha: float | None = None,
    share: float | None = None,
    steps: int | None = None,
    max_lag: int = 3,
    between: bool = False,
    batched_guidance: bool | None = None,
) -> SmoothCacheFile:
    """Record how the outputs of attentions and MLPs change along a run, and make schedules from it.

    Args:
        pipe_or_transformer, run, steps, batched_guidance: as for :func:`calibrate_teacache`; ten prompts are enough.
        alpha: largest error of a reused output; or
        share: of the computed steps, in (0, 1): the least ``alpha`` is taken that computes no more.
        max_lag: most steps in a row that reuse.
        between: see :func:`make_schedule`.

    Raises:
        ValueError: not one of ``alpha`` and ``share`` was given, or out of range.
    """
    if (alpha is None) == (share is None) or (share is not None and not 0 < share < 1) or max_lag < 1:
        raise ValueError(
            f"shiva calibrate smoothcache: got alpha {alpha}, share {share} and max_lag {max_lag}; wanted one of alpha "
            "(at least 0) and share (in (0, 1)), and a lag of at least 1"
        )
    transformer = find_transformer(pipe_or_transformer)
    recorder = _SiteRecorder(max_lag, steps)
    with enable(pipe_or_transformer, recorder, batched_guidance=batched_guidance), torch.no_grad():
        run()
    steps = recorder.place[0]
    if steps is None or steps < 2:
        raise TooFewRuns(f"shiva calibrate smoothcache: the runs had {steps} steps, wanted at least 2")
    lags = range(1, min(max_lag, steps - 1) + 1)
    kinds = dict.fromkeys(kind for kind, _, _ in recorder.errors)
    if not all((kind, lag, i) in recorder.errors for kind in kinds for lag in lags for i in range(steps - lag)):
        raise TooFewRuns(f"shiva calibrate smoothcache: no run had all of its {steps} steps, wanted whole runs")
    errors: dict[str, Rows] = {}
    for kind in kinds:
        errors[kind] = {
            lag: tuple(round(statistics.fmean(recorder.errors[kind, lag, i]), 6) for i in range(steps - lag))
            for lag in lags
        }
    if alpha is None:
        alpha = _alpha_for(errors, share, steps, between)
    fit = Fit.of(transformer, getattr(pipe_or_transformer, "scheduler", None), steps)
    return SmoothCacheFile(errors, alpha, fit, between)


def _alpha_for(errors: dict[str, Rows], share: float, steps: int, between: bool) -> float:
    def computed(alpha: float) -> float:
        found = [make_schedule(rows, alpha, steps, between) for rows in errors.values()]
        return sum(map(sum, found)) / (steps * len(found))

    tried = sorted({e for rows in errors.values() for row in rows.values() for e in row if math.isfinite(e)})
    for alpha in tried:
        if computed(alpha) <= share:
            return alpha
    least = min(map(computed, tried), default=1.0)
    raise ValueError(
        f"shiva calibrate smoothcache: share is {share}, but with these lags and {steps} steps no fewer than "
        f"{least:.0%} can be computed; give more, or a larger max_lag"
    )
