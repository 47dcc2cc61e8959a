"""What an enabled model keeps, layer by layer and step by step, and what that saves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from . import hooks
from .api import Handle, find_handle, find_transformer
from .cached import CacheHandle, get_cache
from .evaluation.overhead import share_of_ops
from .methods.trained import TrainedMethod
from .models import adapter_for


@dataclass(frozen=True)
class Summary:
    """Kept tokens per step and layer.

    Attributes:
        num_tokens: image tokens N.
        sigmas: noise level of each step, S of them.
        kept: tokens that each of L layers processes at each step, [S][L]; of a method that merges around attention or
            MLP alone, those that it leaves there.
        flops: operations of each step's forward for one sample, S of them.
        dense_flops: the same for the dense model.
        hooked: hooked layers.
        wrapped: why hooked blocks do not run in their fused form, by layer; empty if all do.
        note: what the numbers do not say, if anything.
        cache: what the model's cache is, did in the last run and holds, if there is one.
        op_shares: share of the time that each of the package's ops took, if a run was measured, else None.
    """

    num_tokens: int
    sigmas: tuple[float, ...]
    kept: tuple[tuple[int, ...], ...]
    flops: tuple[int, ...]
    dense_flops: int
    hooked: int
    wrapped: dict[int, str] = field(default_factory=dict)
    op_shares: dict[str, float] | None = None
    note: str = ""
    cache: str = ""

    @property
    def mean_ratio(self) -> float:
        """Mean share of tokens kept in the pruned layers."""
        if not self.hooked:
            return 1.0
        first = len(self.kept[0]) - self.hooked
        cells = [k for row in self.kept for k in row[first:]]
        return sum(cells) / len(cells) / self.num_tokens

    @property
    def flop_speedup(self) -> float:
        """Dense operations over the mean step's: the speed-up if time followed operations."""
        return self.dense_flops * len(self.flops) / sum(self.flops)

    def _fused(self) -> str:
        reasons: dict[str, list[str]] = {}
        for layer, reason in self.wrapped.items():
            reasons.setdefault(reason, []).append(f"L{layer}")
        others = "; ".join(f"wrapped {' '.join(layers)}: {reason}" for reason, layers in reasons.items())
        pruned = {layer for row in self.kept for layer, k in enumerate(row) if k < self.num_tokens}
        return f"{len(pruned - self.wrapped.keys())} pruned blocks run fused" + (f"; {others}" if others else "")

    def __str__(self) -> str:
        layers = range(len(self.kept[0]))
        lines = [
            f"shiva_ext: {self.hooked} of {len(layers)} blocks hooked, {self.num_tokens} image tokens, "
            f"mean ratio {self.mean_ratio:.3f}, {sum(self.flops) / len(self.flops) / 1e9:.3f} of "
            f"{self.dense_flops / 1e9:.3f} GFLOPs a step ({self.flop_speedup:.2f}x), "
            f"{len(set(self.kept))} different sets of token counts",
            *([self.note] if self.note else []),
            *([self.cache] if self.cache else []),
            self._fused(),
            "sigma  " + " ".join(f"L{layer:<4}" for layer in layers),
        ]
        for sigma, row in zip(self.sigmas, self.kept, strict=True):
            lines.append(f"{sigma:.3f}  " + " ".join(f"{k:<5}" for k in row))
        if self.op_shares is not None:
            total = sum(self.op_shares.values())
            each = ", ".join(f"{name} {share:.2%}" for name, share in self.op_shares.items())
            lines.append(f"share of time: {total:.2%} in the package's ops ({each or 'none ran'})")
        return "\n".join(lines)


def _tokens(state: hooks.SelectionState, layer: int, N: int, step: int, steps: int) -> int | tuple[int, int]:
    """Tokens that a layer processes; of a method that merges, those of its attention and of its MLP."""
    if state.method is None:
        return state.tokens(layer, N)
    if isinstance(state.method, TrainedMethod):
        found = state.method.processed(state.selector.weights, layer, N, state.sigma)
    else:
        found = state.method.tokens(layer, N, step, steps)
    return N if found == (N, N) else found


def _describe(handle: CacheHandle) -> str:
    """A cache in one line."""
    state, cache = handle.state, handle.cache
    parts = [f"cache: {cache}, {handle.num_hooked} modules hooked" if handle.num_hooked else f"cache: {cache}"]
    if state.last is not None:
        computed, reused = state.last
        parts.append(f"{computed} of {computed + reused} calls computed everything in the last run")
    elif cache.steps is not None and hasattr(cache, "computed"):
        parts.append(f"{cache.computed(cache.steps)} of {cache.steps} steps compute everything")
    parts.append(f"at most {handle.peak_bytes / 2**20:.2f} MiB stored so far")
    parts.append("the operations below are those of a step that computes")
    return "; ".join(parts)


def summary(
    pipe_or_transformer,
    num_tokens: int | None = None,
    steps: int | Sequence[float] = 8,
    text_tokens: int = 77,
    run: Callable[[], object] | None = None,
) -> Summary:
    """Kept and total tokens and operations of an enabled model, and its cache.

    Args:
        pipe_or_transformer: what :func:`shiva_ext.enable` was called on.
        num_tokens: image tokens; by default those of the model's ``sample_size``.
        steps: noise levels, or how many of them spread evenly over (0, 1].
        text_tokens: prompt tokens that run with the image.
        run: a call of the model or pipeline, such as ``lambda: pipe("a cat")``; it is made once, under torch's
            profiler, to measure the share of time that the package's ops take. Blocks that run fused do their norms
            and gates in them; enable with ``fused=False`` to see selection alone. Not for compiled models, whose
            profile is their compiler's.

    Raises:
        RuntimeError: the model is not enabled.
        ValueError: there are no steps, or a noise level is outside [0, 1].
    """
    transformer = find_transformer(pipe_or_transformer)
    handle, cached = find_handle(transformer), get_cache(transformer)
    if handle is None and cached is None:
        raise RuntimeError("shiva_ext is not enabled on this model; call shiva_ext.enable(pipe, source) first")
    adapter = adapter_for(transformer)
    if num_tokens is None:
        num_tokens = adapter.num_tokens(transformer)
    sigmas = [1 - i / steps for i in range(steps)] if isinstance(steps, int) else list(steps)
    if not sigmas:
        raise ValueError(f"shiva_ext: steps is {steps!r}, wanted at least one noise level")
    shares = None if run is None else share_of_ops(run)
    dense = adapter.forward_flops(transformer, text_tokens, num_tokens)
    found = Summary(num_tokens, tuple(sigmas), (), (), dense, 0, op_shares=shares)
    if cached is not None:
        found = replace(found, cache=_describe(cached))
    if handle is None:
        every = (num_tokens,) * len(adapter.blocks(transformer))
        return replace(found, kept=(every,) * len(sigmas), flops=(dense,) * len(sigmas))
    return _of_selection(found, handle, text_tokens)


def _of_selection(found: Summary, handle: Handle, text_tokens: int) -> Summary:
    state, transformer, sigmas, num_tokens = handle.state, handle.transformer, found.sigmas, found.num_tokens
    before = (state.sigma, state.quota, state.fixed)
    kept = []
    try:
        for step, sigma in enumerate(sigmas):
            state.at(sigma)
            place = step, len(sigmas)
            kept.append(tuple(_tokens(state, layer, num_tokens, *place) for layer in range(len(state.quota))))
    finally:
        state.sigma, state.quota, state.fixed = before
    router = getattr(state.selector, "router", None)
    width = 0 if router is None else router.config.hidden

    dim = state.adapter.dims(transformer)["dim"]

    def flops(row):
        pruned = {layer: k for layer, k in enumerate(row) if k != num_tokens}
        total = state.adapter.forward_flops(transformer, text_tokens, num_tokens, pruned, width, state.choosing(pruned))
        return total + (0 if state.method is None else len(pruned) * state.method.matching_flops(num_tokens, dim))

    return replace(
        found,
        kept=tuple(tuple(k if isinstance(k, int) else min(k) for k in row) for row in kept),
        flops=tuple(flops(row) for row in kept),
        hooked=handle.num_hooked,
        wrapped=hooks.wrapped_blocks(transformer, state),
        note=getattr(state.method, "note", ""),
    )
