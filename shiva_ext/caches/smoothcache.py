"""SmoothCache and FORA: schedules, fixed before the run, of which modules compute and which give what they gave."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from diffusers.hooks import ModelHook
from torch import Tensor, nn

from .. import ops
from ..models.per_sample import PerSampleAdapter
from .base import Cache, CachedTransformerHook
from .fit import Fit
from .schedule import every
from .state import CacheState

ALL = "*"  # every kind of module


class Scheduled(Cache):
    """A cache whose steps are known before the run: the same for all images, and one graph a pattern to a compiler."""

    wants_guidance = False

    @abstractmethod
    def begin_step(self, step: int, steps: int) -> tuple[str, ...]:
        """The kinds of modules that give what they gave at their last computed step, or (:data:`ALL`,)."""

    def computed(self, steps: int) -> int:
        """How many of a run's steps compute everything."""
        return sum(not self.begin_step(step, steps) for step in range(steps))

    def transformer_hook(self, state: CacheState, hooks: list[ModelHook]) -> "ScheduledTransformerHook":
        return ScheduledTransformerHook(state, hooks)

    def attach(self, transformer: nn.Module, state: CacheState) -> list[tuple[nn.Module, ModelHook]]:
        found = sites_of(transformer, state.adapter)
        unknown = [kind for kind in self.kinds() or () if kind not in found]
        if unknown:
            raise ValueError(
                f"shiva_ext: {type(self).__name__} has a schedule for {unknown[0]!r}; {type(transformer).__name__} has "
                f"{', '.join(map(repr, found))}"
            )
        return [
            (module, SiteHook(state, kind, parts))
            for kind, sites in found.items()
            if self.kinds() is None or kind in self.kinds()
            for module, parts in sites
        ]

    def kinds(self) -> tuple[str, ...] | None:
        """The kinds of modules that have a schedule; None is all that the model has."""
        return None

    def check_selection(self, selection) -> None:
        method = selection.method
        if method is not None and not method.whole_modules:
            raise ValueError(
                f"shiva_ext: {type(method).__name__} runs attention and MLP on tokens that change from step to step, "
                f"so what they gave cannot be given again by {self.name}; use TeaCache, which skips whole steps"
            )

    def memory_bound(self, layers: int, B: int, N: int, T: int, D: int) -> int:
        # Attention with text in one stream, cross-attention, MLP; a single-stream block keeps its MLP's 4 D channels.
        return layers * B * (N + T) * D * 7


def sites_of(transformer: nn.Module, adapter) -> dict[str, list[tuple[nn.Module, tuple[str, ...]]]]:
    """The modules whose outputs can be kept, of all blocks, by kind; see ``ModelAdapter.cache_sites``."""
    found: dict[str, list] = {}
    for block in adapter.blocks(transformer):
        for kind, sites in adapter.cache_sites(block).items():
            found.setdefault(kind, []).extend(sites)
    return found


@dataclass(frozen=True)
class SmoothCache(Scheduled):
    """SmoothCache (arXiv 2411.10510; code github.com/Roblox/SmoothCache).

    The outputs of all attentions, and of all MLPs, are kept and given again at the steps that a schedule says, as they
    were before the gate and the residual sum. Schedules come from one run without a cache: see
    :func:`~shiva_ext.caches.make_schedule` and ``shiva calibrate smoothcache``.

    Attributes:
        schedules: by kind of module ("attention", "mlp", and "cross_attention" where there is one): of each step
            whether it computes, 1 or 0. Kinds that are left out compute always.
        steps: of a run; by default as many as the schedules have.
        fit: what the schedules were made for, if known: another model, scheduler or number of steps is refused.

    Beside a selection of tokens a module's output is kept for every token: a token that is chosen where the module
    reuses gets what it got the last time that it was computed, and nothing if it never was.
    """

    schedules: Mapping[str, Sequence[int]]
    steps: int | None = None
    fit: Fit | None = field(default=None, repr=False)

    def __post_init__(self):
        if not self.schedules:
            raise ValueError("SmoothCache: schedules is empty, wanted one for 'attention', 'mlp' or both")
        plain = {kind: tuple(int(each) for each in schedule) for kind, schedule in self.schedules.items()}
        lengths = {len(schedule) for schedule in plain.values()}
        if len(lengths) > 1 or not min(lengths):
            raise ValueError(f"SmoothCache: schedules of {sorted(lengths)} steps, wanted equally many, at least 1")
        for kind, schedule in plain.items():
            if set(schedule) - {0, 1} or not schedule[0]:
                raise ValueError(
                    f"SmoothCache: the schedule of {kind!r} is {schedule}, wanted 1 (compute) or 0 a step, the first 1"
                )
        steps = lengths.pop()
        if self.steps not in (None, steps):
            raise ValueError(f"SmoothCache: steps is {self.steps}, but the schedules have {steps}")
        object.__setattr__(self, "schedules", plain)
        object.__setattr__(self, "steps", steps)

    def kinds(self) -> tuple[str, ...]:
        return tuple(self.schedules)

    def begin_step(self, step: int, steps: int) -> tuple[str, ...]:
        if steps != self.steps:
            raise ValueError(
                f"shiva_ext: SmoothCache has schedules of {self.steps} steps, got a run of {steps}; make as many, or "
                "calibrate for these"
            )
        return tuple(kind for kind, schedule in self.schedules.items() if not schedule[step])

    def attach(self, transformer: nn.Module, state: CacheState) -> list[tuple[nn.Module, ModelHook]]:
        if self.fit is not None:
            self.fit.check_model(transformer)
        return super().attach(transformer, state)

    def check_scheduler(self, scheduler) -> None:
        if self.fit is not None:
            self.fit.check_scheduler(scheduler)

    @property
    def computed_share(self) -> float:
        """Share of the steps that compute, over the kinds that have a schedule."""
        return sum(map(sum, self.schedules.values())) / (self.steps * len(self.schedules))


@dataclass(frozen=True)
class FORA(Scheduled):
    """FORA (arXiv 2407.01425): attention and MLP compute at every n-th step and at the last.

    Attributes:
        interval: n; 1 computes always.
        steps: of a run, see :class:`Cache`.
    """

    interval: int = 2
    steps: int | None = None

    def __post_init__(self):
        if self.interval < 1:
            raise ValueError(f"FORA: interval is {self.interval}, wanted at least 1")

    def begin_step(self, step: int, steps: int) -> tuple[str, ...]:
        return () if every(self.interval, steps)[step] else (ALL,)


class _Kept:
    """A module's outputs, by branch of guidance and call: attributes, which a compiler writes without looking."""


class SiteHook(ModelHook):
    """On a module: gives again what it gave at the last step that computed, where the schedule says so.

    Args:
        state: of the cache.
        kind: of module.
        parts: what the tensors that it gives hold: "image" tokens, "text" tokens, or "joint", text before image; or
            a "map" of image tokens, [B,C,H,W].
    """

    def __init__(self, state: CacheState, kind: str, parts: tuple[str, ...]):
        super().__init__()
        self.state, self.kind, self.parts = state, kind, parts
        self.calls = 0  # in this call of the transformer; samples, where pruned blocks run once for each
        self.kept = _Kept()
        state.stores.append(vars(self.kept))

    def new_forward(self, module: nn.Module, *args, **kwargs):
        state, forward = self.state, self.fn_ref.original_forward
        if state.bypass:
            return forward(*args, **kwargs)
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        kept, total = self._chosen(len(x))
        places = self._places(len(x))
        if self.kind in state.planned or ALL in state.planned:
            stored = self._stored(places)
            if stored is not None:
                return self._restored(stored, x, kept, total)
        output = forward(*args, **kwargs)
        parts = output if isinstance(output, tuple) else (output,)
        old = None if kept is None else self._stored(places)
        self._store(places, self._whole(parts, old or (None,) * len(parts), kept, total))
        return output

    @property
    def _each_sample(self) -> bool:
        """Whether blocks may run once for each sample, and outputs are kept by sample."""
        return self.state.selection is not None and isinstance(self.state.adapter, PerSampleAdapter)

    def _chosen(self, rows: int) -> tuple[Tensor | None, int]:
        """Which tokens [B,k] the coming call with so many rows runs on, and of how many; None is all."""
        selection = self.state.selection
        if selection is None or selection.kept is None:
            return None, 0
        kept, total = selection.kept
        return (kept[self.calls : self.calls + rows] if self._each_sample else kept), total

    def _places(self, rows: int) -> list[str]:
        """Where the call's outputs are kept."""
        count = rows if self._each_sample else 1
        self.calls += count
        return [f"{self.state.key[0]}, {i}" for i in range(self.calls - count, self.calls)]

    def _stored(self, places: list[str]) -> tuple[Tensor, ...] | None:
        found = [getattr(self.kept, place, (None, ())) for place in places]
        if any(key != self.state.key for key, _ in found):
            return None
        if len(found) == 1:
            return found[0][1]
        return tuple(map(torch.cat, zip(*(parts for _, parts in found), strict=True)))

    def _store(self, places: list[str], parts: tuple[Tensor, ...]) -> None:
        samples = zip(*(part.chunk(len(places)) for part in parts), strict=True)
        for place, own in zip(places, samples, strict=True):
            setattr(self.kept, place, (self.state.key, own))

    def _whole(self, parts: Sequence[Tensor], old: Sequence[Tensor | None], kept: Tensor | None, total: int) -> tuple:
        """Parts as they are stored: of all tokens [B,N,D], those of before where a token has none."""
        found = []
        for what, part, before in zip(self.parts, parts, old, strict=False):
            part = part.detach()
            if what != "text":
                part = part.flatten(2).transpose(1, 2) if what == "map" else part.flatten(1, -2)
                if kept is not None:
                    text = part.shape[1] - kept.shape[1]
                    if text < 0 or (text and what != "joint"):
                        raise ValueError(
                            f"shiva_ext: the {self.kind} of a block was called with {part.shape[1]} of its "
                            f"{kept.shape[1]} tokens; turn forward chunking off beside a selection"
                        )
                    index, size = self._index(what, text, kept, total)
                    before = part.new_zeros(len(part), size, part.shape[2]) if before is None else before
                    part = ops.token_scatter(before, index, part.contiguous())
            found.append(part)
        return tuple(found)

    def _restored(self, stored: tuple[Tensor, ...], x: Tensor, kept: Tensor | None, total: int):
        parts = []
        for what, part in zip(self.parts, stored, strict=False):
            if what != "text" and kept is not None:
                index, _ = self._index(what, part.shape[1] - total, kept, total)
                part = ops.token_gather(part, index)
            if what == "map":
                part = part.transpose(1, 2).unflatten(2, x.shape[2:])
            parts.append(part.reshape(*x.shape[:-1], -1) if what == "image" else part)
        return parts[0] if len(parts) == 1 else tuple(parts)

    @staticmethod
    def _index(what: str, text: int, kept: Tensor, total: int) -> tuple[Tensor, int]:
        """Rows of a part's tokens among all of its kind, and how many there are."""
        if what != "joint":
            return kept, total
        front = torch.arange(text, device=kept.device).expand(len(kept), -1)
        return torch.cat([front, kept + text], dim=1), text + total


class ScheduledTransformerHook(CachedTransformerHook):
    """On the transformer of a :class:`Scheduled` cache."""

    def __init__(self, state: CacheState, site_hooks: list[SiteHook]):
        super().__init__(state)
        self.site_hooks = site_hooks

    def run(self, module: nn.Module, forward, args: tuple, kwargs: dict):
        state = self.state
        for hook in self.site_hooks:
            hook.calls = 0
        if not (state.bypass or torch.compiler.is_compiling()):
            state.computed, state.reused = state.computed + (not state.planned), state.reused + bool(state.planned)
        return forward(*args, **kwargs)
