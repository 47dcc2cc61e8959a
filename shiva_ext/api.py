"""One line to make a pipeline faster, and one to undo it."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from . import hooks
from .adapter_weights import MergedAdapter
from .artifact import BaselineSource, MethodSource, ShivaArtifact, load
from .cached import CacheHandle, cache_taken_off, enable_cache, get_cache
from .caches import Cache, DiffusersCache, load_cache
from .caches.from_diffusers import CONFIGS
from .configuration import Configuration, is_configuration
from .method_artifact import MethodArtifact
from .methods import Method, TrainedMethod
from .models import adapter_for
from .reconstruct import CHOICES, IDENTITY
from .scheduler_watch import SchedulerWatch
from .selection import RatioTable, default_tile
from .vit import PatchConfig, PatchPruner, ViTHandle
from .vit.handle import enable_patches, get_patches
from .vlm import FastVConfig, FeatherConfig, FeatherHandle
from .vlm.feather import enable_feather, get_feather

_HANDLE, _ROUTER = "_shiva_ext_handle", "shiva_ext_router"


class Handle:
    """What :func:`enable` returns.

    Attributes:
        transformer: the hooked model.
        num_hooked: hooked blocks.
        records: while :meth:`record` is on, one entry per call of the transformer:
            ``{"timestep": float, "kept": {layer: [B,k] int64}}``; for a method that merges, the tokens that stay
            independent, and ``"sites": {layer: names}`` where it did. Beside :class:`~shiva_ext.caches.TeaCache` and
            :class:`~shiva_ext.caches.GuidanceCache` a call that ran for some samples alone has their numbers as
            ``"rows"`` [b], and [b,k] tokens.
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

    @contextmanager
    def exportable(self) -> Iterator[nn.Module]:
        """The transformer with the router among its modules, for ``torch.export``, which wants to own all weights.

        The exported program is one denoising step at the noise level of :meth:`at`, with that step's token counts::

            with handle.at(0.7).exportable() as transformer:
                program = torch.export.export(transformer, (), inputs, strict=True)

        Raises:
            RuntimeError: no noise level was announced, or a cache is enabled.
        """
        if get_cache(self.transformer) is not None:
            raise RuntimeError(
                "shiva_ext: an export is of one step, and the model's cache takes from earlier ones; disable it first"
            )
        if not self.state.quota:
            raise RuntimeError("shiva_ext: an export is of one noise level's token counts; call handle.at(sigma) first")
        if getattr(self.state.selector, "weights", None) is not None:
            raise RuntimeError(
                f"shiva_ext: {type(self.state.method).__name__} cannot be exported; export the dense model, or a "
                "selection of Shiva's"
            )
        router = getattr(self.state.selector, "router", None)
        try:
            if router is not None:
                self.transformer.add_module(_ROUTER, router)
            yield self.transformer
        finally:
            self.transformer._modules.pop(_ROUTER, None)

    def disable(self) -> None:
        """Restore the model bit for bit. Harmless if done before."""
        with cache_taken_off(self.transformer) as cached:
            while self._undo:
                self._undo.pop()()
            if getattr(self.transformer, _HANDLE, None) is self:
                delattr(self.transformer, _HANDLE)
                if cached is not None:
                    cached.state.selection = None

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *error) -> None:
        self.disable()


def find_transformer(pipe_or_transformer, component: str = "transformer") -> nn.Module:
    """The denoiser of a pipeline (``.transformer``), or the module itself, out of its torch.compile wrapper."""
    module = getattr(pipe_or_transformer, component, None)
    if module is None:
        if component != "transformer":
            raise ValueError(f"shiva_ext: {type(pipe_or_transformer).__name__} has no component {component!r}")
        module = pipe_or_transformer
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"shiva_ext: got {type(pipe_or_transformer).__name__}, wanted a diffusers pipeline with a transformer, or "
            "the transformer itself"
        )
    return getattr(module, "_orig_mod", module)


def _selector(
    source,
    transformer: nn.Module,
    ratio: float | None,
    budget: float | None,
    tile: int | None,
    sigmas: Sequence[float] | Tensor | None,
    max_distinct_k: int | None,
    share_selection: bool | None,
):
    """The source as something that scores tokens, with its table solved for this model's size."""
    adapter = adapter_for(transformer)
    dims = adapter.dims(transformer)
    for name, value in (("ratio", ratio), ("budget", budget)):
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"shiva_ext: {name} is {value}, wanted a share of the tokens above 0 and at most 1")
    if isinstance(source, (str, os.PathLike)):
        source = load(source)
    if not isinstance(source, ShivaArtifact):
        baseline, method = hasattr(source, "ratio"), isinstance(source, (Method, MethodArtifact))
        selector = hasattr(source, "scores") and (baseline or hasattr(source, "ratios"))
        if not method and not selector:
            raise TypeError(
                f"shiva_ext: source is a {type(source).__name__}, wanted an artefact's folder or hub id, a "
                "ShivaArtifact, a method of shiva_ext.methods, or a selector with ratios() and scores()"
            )
        refused = (ratio, budget, sigmas, max_distinct_k, share_selection, tile if method else None)
        if any(each is not None for each in refused):
            raise ValueError(
                "shiva_ext: ratio, budget, sigmas, max_distinct_k, share_selection (and tile, with a method) are for "
                "Shiva's artefacts; "
                f"{type(source).__name__} has its own ratios, give it others"
            )
        if isinstance(source, MethodArtifact):
            return source.source(transformer)
        if isinstance(source, TrainedMethod):
            raise TypeError(
                f"shiva_ext: {type(source).__name__} has weights of its own, got its settings alone; train it (shiva "
                f"train --method {type(source).__name__.lower()}) and enable the folder that is written"
            )
        if method:
            return MethodSource(source, dims["num_layers"])
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
    if ratio is not None and any(each is not None for each in (budget, sigmas, max_distinct_k)):
        raise ValueError(
            "shiva_ext: ratio fixes one share everywhere; budget, sigmas and max_distinct_k are about the learned "
            "schedule: give one or the other"
        )
    if share_selection is not None:
        source = replace(source, share_selection=share_selection)
    if ratio is not None:
        return replace(source, table=RatioTable.fixed(ratio, dims["num_layers"], source.first_layer))
    if sigmas is not None:
        policy = source.policy
        table = table.at_levels(sigmas) if policy is None else RatioTable.from_policy(policy, sigmas)
    num_tokens = adapter.num_tokens(transformer)
    tile = default_tile(num_tokens) if tile is None else tile
    together = source.router.group_sizes() if source.share_selection else None
    asked = together is not None or any(each is not None for each in (budget, sigmas, max_distinct_k))
    if asked or (tile > 1 and num_tokens % tile == 0):  # other tiles only round, from call to call
        cost = torch.tensor(adapter.token_costs(transformer)[table.first_layer :], device="cpu")
        budget = max(source.table.mean(cost), tile / num_tokens) if budget is None else budget
        table = table.with_budget(budget, num_tokens, tile, cost, max_distinct_k, together)
    return replace(source, table=table)


def enable(
    pipe_or_transformer,
    source,
    *,
    ratio: float | None = None,
    budget: float | None = None,
    tile: int | None = None,
    sigmas: Sequence[float] | Tensor | None = None,
    max_distinct_k: int | None = None,
    share_selection: bool | None = None,
    batched_guidance: bool | None = None,
    adapter: bool = True,
    tuned: str | os.PathLike | None = None,
    fused: bool = True,
    reconstruct: str = IDENTITY,
    component: str = "transformer",
) -> "Handle | CacheHandle | Together | FeatherHandle | ViTHandle":
    """Make a model process only the tokens that matter, or compute only the steps that do.

    A selection of tokens and a cache are enabled by a call each, in any order, and work together; a second selection
    replaces the first, and a second cache the first cache.

    Args:
        pipe_or_transformer: a diffusers pipeline, or its transformer. With a pipeline the noise levels and guidance are
            taken from it, and a compiled transformer works without further calls. Where pipelines share a transformer,
            enable the one that runs next.
        source: an artefact's folder or hub id, a :class:`ShivaArtifact`, or a selector from
            :mod:`shiva_ext.selection` such as ``RandomSelector(0.6)``, or a method of :mod:`shiva_ext.methods` such as
            ``ToMeSD(0.5)``. Or a cache: of :mod:`shiva_ext.caches` such as ``FORA(2)``, a ``.json`` file that ``shiva
            calibrate`` has written, or a cache config of diffusers; all further arguments but ``batched_guidance`` and
            ``component`` are for selections. Or a :class:`Configuration` of both, or the ``.json`` file of one that
            ``shiva tune`` has written. Or, for a vision-language model of transformers, a
            :class:`~shiva_ext.vlm.FeatherConfig` or :class:`~shiva_ext.vlm.FastVConfig`, alone. Or, for a vision
            transformer of transformers, a :class:`~shiva_ext.vit.PatchPruner`, alone.
        ratio: keep this share of the tokens in every layer and step instead of the learned schedule; 1 is dense.
        budget: keep the learned schedule's form, but move it to this mean share, without training. The token counts
            of all steps and layers then meet it to within one tile (of every step that shares it), at the model's own
            image size and with every layer's tokens weighted by what they cost; see
            :func:`~shiva_ext.selection.solve_budget`.
        tile: token counts are multiples of this. One that divides the model's token count keeps the schedule's mean
            to within a tile; any other just rounds each count, and is refused where the table has to be solved
            (``budget``, ``sigmas``, ``max_distinct_k``, a shared selection). By default
            :func:`~shiva_ext.selection.default_tile`: 1 below 1,024 tokens, 16, 64 or 128 above.
        sigmas: the noise levels of the sampler's steps, such as ``pipe.scheduler.timesteps / 1000`` after
            ``set_timesteps``; the schedule is then taken at these and the budget holds for exactly these steps. By
            default the artefact's own levels count, and each step uses the nearest.
        max_distinct_k: let noise levels share their token counts so that no more than this many different sets of
            them occur, each of which is one graph to a compiler.
        share_selection: whether layers that share a router also share its choice of tokens, so that it scores them
            once; by default what the artefact was trained with.
        batched_guidance: whether the batch is (unconditional, conditional); such pairs keep the same tokens. By default
            what the pipeline says, and False for a bare transformer.
        adapter: whether to merge the artefact's tuned weights into the model.
        tuned: another artefact of the same model, by its folder or hub id, whose tuning is added to this one's weight
            by weight (task arithmetic, arXiv 2212.04089): of guidance learned and of tuning on data, for example. It
            costs nothing to run; look at the pictures, for nothing was trained together.
        fused: run blocks whose class is known in a form that gathers and normalises, and gates and scatters, in one
            pass each; equal to the wrapped block within rounding. :func:`summary` names blocks that run wrapped anyway,
            and why. False wraps every block.
        reconstruct: what a block gives to tokens that it did not process: "identity" nothing, as the method has it;
            "nearest" what it added to the nearest kept token of the image; "last" what it added to the same token when
            it was last kept in this run, which takes a tensor [B,N,D] a block. Such blocks run wrapped.
        component: which of a pipeline's models; those that have two, such as Wan 2.2's, call the second one
            ``transformer_2``, and each wants an artefact of its own. :func:`disable` restores both.

    Returns:
        A :class:`Handle`, for a cache a :class:`CacheHandle`, for a vision-language model a
        :class:`~shiva_ext.vlm.FeatherHandle`, for a vision transformer a :class:`~shiva_ext.vit.ViTHandle`; use it as a
        context manager to disable it at the end.

    Raises:
        TypeError: an unknown model family or source.
        ValueError: the artefact does not fit the model, or an argument is out of range.
        RuntimeError: no block was hooked.
    """
    transformer = find_transformer(pipe_or_transformer, component)
    given = (ratio, budget, tile, sigmas, max_distinct_k, share_selection)
    given = (*given, tuned)
    asked = any(each is not None for each in given) or not (adapter and fused) or reconstruct != IDENTITY
    if isinstance(source, (FeatherConfig, FastVConfig)):
        if asked or batched_guidance is not None:
            raise ValueError(f"shiva_ext: {type(source).__name__} has all of its settings in it; no other is for it")
        return enable_feather(transformer, source)
    if isinstance(source, (PatchPruner, PatchConfig)):
        if asked or batched_guidance is not None:
            raise ValueError(f"shiva_ext: {type(source).__name__} has all of its settings in it; no other is for it")
        return enable_patches(transformer, source)
    if isinstance(source, (str, os.PathLike)) and Path(source).suffix == ".json" and is_configuration(source):
        source = Configuration.load(source)
    if isinstance(source, Configuration):
        if asked:
            raise ValueError(
                "shiva_ext: a configuration has all settings in it; enable its selection and its cache by themselves "
                "to change them"
            )
        return _enable_configuration(pipe_or_transformer, source, batched_guidance, component)
    second, cache = getattr(pipe_or_transformer, "transformer_2", None), _as_cache(source)
    done = second is None or hasattr(second, _HANDLE) if cache is None else get_cache(second) is not None
    if component == "transformer" and second is not None and not done:
        warnings.warn(
            "shiva_ext: the pipeline has a second transformer, for its low noise levels, which stays dense until "
            "enable(pipe, ..., component='transformer_2')",
            stacklevel=2,
        )
    if cache is not None:
        if asked:
            raise ValueError(
                f"shiva_ext: {cache.name} selects no tokens; ratio, budget, tile, sigmas, max_distinct_k, "
                "share_selection, adapter, tuned, fused and reconstruct are for selections, which are enabled by a "
                "call of their own"
            )
        selection = find_handle(transformer)
        return enable_cache(
            pipe_or_transformer, transformer, cache, batched_guidance, None if selection is None else selection.state
        )
    for name, value in (("tile", tile), ("max_distinct_k", max_distinct_k)):
        if value is not None and value < 1:
            raise ValueError(f"shiva_ext: {name} is {value}, wanted at least 1")
    if reconstruct not in CHOICES:
        raise ValueError(f"shiva_ext: reconstruct is {reconstruct!r}, wanted one of {', '.join(map(repr, CHOICES))}")
    selector = _selector(source, transformer, ratio, budget, tile, sigmas, max_distinct_k, share_selection)
    if isinstance(selector, MethodSource) and reconstruct != IDENTITY:
        raise ValueError(
            f"shiva_ext: {type(source).__name__} gives every token a value of its own; reconstruct is for selectors, "
            "which leave tokens out"
        )
    router = getattr(selector, "router", None)
    device = next(transformer.parameters()).device
    # On meta are the weights of an offloaded model.
    if router is not None and device.type != "meta" and next(router.parameters()).device != device:
        router.to(device)
    state = hooks.SelectionState(selector, adapter_for(transformer), tile, bool(batched_guidance), fused, reconstruct)
    state.check_guidance(bool(batched_guidance))
    if (cached := get_cache(transformer)) is not None:
        cached.cache.check_selection(state)
    folders = _adapters(selector, adapter, tuned)
    handle = Handle(transformer, state)
    with cache_taken_off(transformer):
        _disable_selection(transformer)
        try:
            if folders:
                handle._undo.append(MergedAdapter(transformer, *folders).remove)
            handle._undo.append(lambda: hooks.detach(transformer))
            handle.num_hooked = hooks.attach(transformer, state)
            if pipe_or_transformer is not transformer and hasattr(pipe_or_transformer, "scheduler"):
                state.watch = SchedulerWatch(pipe_or_transformer, state, batched_guidance)
                handle._undo.append(state.watch.remove)
        except BaseException:
            handle.disable()
            raise
        setattr(transformer, _HANDLE, handle)
        if cached is not None:
            cached.state.selection = state
    return handle


def _adapters(selector, adapter: bool, tuned: str | os.PathLike | None) -> list[Path]:
    """Folders of the adapters that are merged: the selection's own, and another artefact's."""
    own = getattr(selector, "adapter", None) if adapter else None
    folders = [] if own is None else [Path(own)]
    if tuned is None:
        return folders
    other = load(tuned)
    if other.adapter is None:
        raise ValueError(f"shiva_ext: tuned is {str(tuned)!r}, an artefact without tuned weights, so it adds nothing")
    if learned := getattr(other, "guidance", 0):
        raise ValueError(
            f"shiva_ext: the weights of tuned={str(tuned)!r} give guidance of {learned:g} in one call, which would go "
            "unnoticed; enable that artefact, with the other one as tuned"
        )
    return [*folders, Path(other.adapter)]


class Together:
    """The handles of a configuration's selection and cache; either may be None."""

    def __init__(self, selection: Handle | None, cache: CacheHandle | None):
        self.selection, self.cache = selection, cache

    def disable(self) -> None:
        """Take both off."""
        for handle in (self.cache, self.selection):
            if handle is not None:
                handle.disable()

    def __enter__(self) -> "Together":
        return self

    def __exit__(self, *error) -> None:
        self.disable()


def _enable_configuration(pipe, source: Configuration, batched_guidance: bool | None, component: str) -> Together:
    common = {"batched_guidance": batched_guidance, "component": component}
    cache, found = source.build_cache(), Together(None, None)
    try:
        if source.selection is not None:
            found.selection = enable(pipe, source.selection, budget=source.budget, **common)
        if cache is not None:
            found.cache = enable(pipe, cache, **common)
    except BaseException:
        found.disable()
        raise
    return found


def _as_cache(source) -> Cache | None:
    """The source as a cache, if it is one."""
    if type(source) in CONFIGS:
        return DiffusersCache(source)
    if isinstance(source, (str, os.PathLike)) and Path(source).suffix == ".json":
        return load_cache(source)
    return source if isinstance(source, Cache) else None


def disable(pipe_or_transformer) -> None:
    """Restore a model, or all of a pipeline's, bit for bit; does nothing if it was not enabled."""
    components = ["transformer"]
    if getattr(pipe_or_transformer, "transformer_2", None) is not None:
        components.append("transformer_2")
    for component in components:
        transformer = find_transformer(pipe_or_transformer, component)
        if (cached := get_cache(transformer)) is not None:
            cached.disable()
        _disable_selection(transformer)
        for pruned in (get_feather(transformer), get_patches(transformer)):
            if pruned is not None:
                pruned.disable()


def _disable_selection(transformer: nn.Module) -> None:
    if (handle := find_handle(transformer)) is not None:
        handle.disable()


def find_handle(transformer: nn.Module) -> Handle | None:
    """The handle of a transformer's selection, if it has one."""
    return getattr(transformer, _HANDLE, None)


def get_handle(pipe_or_transformer) -> Handle:
    """The handle of a model on which a selection is enabled.

    Raises:
        RuntimeError: none is.
    """
    handle = find_handle(find_transformer(pipe_or_transformer))
    if handle is None:
        raise RuntimeError("shiva_ext is not enabled on this model; call shiva_ext.enable(pipe, source) first")
    return handle
