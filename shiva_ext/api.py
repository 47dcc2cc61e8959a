"""One line to make a pipeline faster, and one to undo it."""

import os
from dataclasses import replace
from pathlib import Path

from torch import nn

from . import hooks
from .adapter_weights import MergedAdapter
from .artifact import BaselineSource, ShivaArtifact
from .models import adapter_for
from .scheduler_watch import SchedulerWatch
from .selection import RatioTable

_HANDLE = "_shiva_ext_handle"


class Handle:
    """What :func:`enable` returns.

    Attributes:
        transformer: the hooked model.
        num_hooked: hooked blocks.
        records: while :meth:`record` is on, one entry per call of the transformer:
            ``{"timestep": float, "kept": {layer: [B,k] int64}}``.
    """

    def __init__(self, transformer: nn.Module, state: hooks.SelectionState):
        self.transformer, self.state = transformer, state
        self.num_hooked = 0
        self._undo = []

    @property
    def records(self) -> list[dict]:
        return self.state.records

    def record(self, on: bool = True) -> "Handle":
        """Start (and empty) or stop the recording of kept tokens. Not for compiled transformers."""
        self.state.recording = on
        if on:
            self.state.records = []
        return self

    def at(self, sigma: float) -> "Handle":
        """Fix the noise level of the coming calls, in [0, 1]; for a compiled transformer outside a pipeline.

        It holds, whatever their timesteps are, until the next call of this or the next step of a pipeline.
        """
        self.state.at(sigma, fixed=True)
        return self

    def disable(self) -> None:
        """Restore the model bit for bit. Harmless if done before."""
        while self._undo:
            self._undo.pop()()
        if getattr(self.transformer, _HANDLE, None) is self:
            delattr(self.transformer, _HANDLE)

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *error) -> None:
        self.disable()


def find_transformer(pipe_or_transformer) -> nn.Module:
    """The denoiser of a pipeline (``.transformer``), or the module itself, out of its torch.compile wrapper."""
    module = getattr(pipe_or_transformer, "transformer", None)
    if module is None:
        module = pipe_or_transformer
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"shiva_ext: got {type(pipe_or_transformer).__name__}, wanted a diffusers pipeline with a transformer, or "
            "the transformer itself"
        )
    return getattr(module, "_orig_mod", module)


def _selector(source, transformer: nn.Module, ratio: float | None, budget: float | None):
    adapter = adapter_for(transformer)
    dims = adapter.dims(transformer)
    for name, value in (("ratio", ratio), ("budget", budget)):
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"shiva_ext: {name} is {value}, wanted a share of the tokens above 0 and at most 1")
    if isinstance(source, (str, os.PathLike)):
        source = ShivaArtifact.load(source)
    if not isinstance(source, ShivaArtifact):
        baseline = hasattr(source, "ratio")
        if not hasattr(source, "scores") or not (baseline or hasattr(source, "ratios")):
            raise TypeError(
                f"shiva_ext: source is a {type(source).__name__}, wanted an artefact's folder or hub id, a "
                "ShivaArtifact, or a selector with ratios() and scores()"
            )
        if budget is not None or ratio is not None:
            raise ValueError("shiva_ext: ratio and budget belong to the selector itself here; give it another ratio")
        return BaselineSource(source, dims["num_layers"]) if baseline else source
    config, table = source.router.config, source.table
    wrong = [f"{k} {getattr(config, k)} (model: {v})" for k, v in dims.items() if getattr(config, k) != v]
    if source.model_class not in (cls.__name__ for cls in type(transformer).__mro__):
        wrong.insert(0, f"class {source.model_class} (model: {type(transformer).__name__})")
    if table.num_layers != config.num_layers:
        wrong.append(f"ratios for {table.num_layers} layers (router: {config.num_layers})")
    if wrong:
        raise ValueError(
            f"shiva_ext: the artefact was trained for another model: it has {', '.join(wrong)}; enable it on that "
            "model, or train one for this model"
        )
    if ratio is not None and budget is not None:
        raise ValueError(
            "shiva_ext: got both ratio and budget, wanted one: ratio fixes one share everywhere, budget keeps the "
            "schedule"
        )
    if ratio is not None:
        source = replace(source, table=RatioTable.fixed(ratio, dims["num_layers"], source.first_layer))
    if budget is not None:
        source = replace(source, table=source.table.with_budget(budget, num_tokens=adapter.num_tokens(transformer)))
    return source


def enable(
    pipe_or_transformer,
    source,
    *,
    ratio: float | None = None,
    budget: float | None = None,
    tile: int = 1,
    batched_guidance: bool | None = None,
    adapter: bool = True,
) -> Handle:
    """Make a model process only the tokens that matter.

    Args:
        pipe_or_transformer: a diffusers pipeline, or its transformer. With a pipeline the noise levels and guidance are
            taken from it, and a compiled transformer works without further calls. Where pipelines share a transformer,
            enable the one that runs next.
        source: an artefact's folder or hub id, a :class:`ShivaArtifact`, or a selector from
            :mod:`shiva_ext.selection` such as ``RandomSelector(0.6)``.
        ratio: keep this share of the tokens in every layer and step instead of the learned schedule; 1 is dense.
        budget: keep the learned schedule's form, but scale it to this mean share.
        tile: round token counts to multiples of this.
        batched_guidance: whether the batch is (unconditional, conditional); such pairs keep the same tokens. By default
            what the pipeline says, and False for a bare transformer.
        adapter: whether to merge the artefact's tuned weights into the model.

    Returns:
        A :class:`Handle`; use it as a context manager to disable at the end. Enabling again replaces what was enabled.

    Raises:
        TypeError: an unknown model family or source.
        ValueError: the artefact does not fit the model, or an argument is out of range.
        RuntimeError: no block was hooked.
    """
    transformer = find_transformer(pipe_or_transformer)
    selector = _selector(source, transformer, ratio, budget)
    if tile < 1:
        raise ValueError(f"shiva_ext: tile is {tile}, wanted at least 1")
    disable(transformer)
    router = getattr(selector, "router", None)
    device = next(transformer.parameters()).device
    if router is not None and device.type != "meta":  # on meta are the weights of an offloaded model
        router.to(device)
    state = hooks.SelectionState(selector, adapter_for(transformer), tile, bool(batched_guidance))
    handle = Handle(transformer, state)
    try:
        if adapter and getattr(selector, "adapter", None) is not None:
            merged = MergedAdapter(transformer, Path(selector.adapter))
            handle._undo.append(merged.remove)
        handle._undo.append(lambda: hooks.detach(transformer))
        handle.num_hooked = hooks.attach(transformer, state)
        if pipe_or_transformer is not transformer and hasattr(pipe_or_transformer, "scheduler"):
            state.watch = SchedulerWatch(pipe_or_transformer, state, batched_guidance)
            handle._undo.append(state.watch.remove)
    except BaseException:
        handle.disable()
        raise
    setattr(transformer, _HANDLE, handle)
    return handle


def disable(pipe_or_transformer) -> None:
    """Restore a model bit for bit; does nothing if it was not enabled."""
    handle = getattr(find_transformer(pipe_or_transformer), _HANDLE, None)
    if handle is not None:
        handle.disable()


def get_handle(pipe_or_transformer) -> Handle:
    """The handle of an enabled model.

    Raises:
        RuntimeError: it is not enabled.
    """
    handle = getattr(find_transformer(pipe_or_transformer), _HANDLE, None)
    if handle is None:
        raise RuntimeError("shiva_ext is not enabled on this model; call shiva_ext.enable(pipe, source) first")
    return handle
