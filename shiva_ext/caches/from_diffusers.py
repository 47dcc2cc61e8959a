"""diffusers' own caches on any model that they can run on, also where its pipeline knows nothing of them."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from diffusers import hooks as diffusers_hooks
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import CacheContext, StateManager, _set_cache_context
from torch import Tensor, nn

from ..hooks import remove
from .base import Cache, CachedTransformerHook
from .smoothcache import sites_of
from .state import CacheState, bytes_of

_TEXT_HOOK = "shiva_ext_cache_text"


def _apply_functions() -> dict[type, object]:
    names = {
        "FirstBlockCacheConfig": "apply_first_block_cache",
        "TaylorSeerCacheConfig": "apply_taylorseer_cache",
        "MagCacheConfig": "apply_mag_cache",
        "PyramidAttentionBroadcastConfig": "apply_pyramid_attention_broadcast",
        "FasterCacheConfig": "apply_faster_cache",
        "SeaCacheConfig": "apply_sea_cache",
    }
    found = {getattr(diffusers_hooks, config, None): getattr(diffusers_hooks, f, None) for config, f in names.items()}
    return {config: function for config, function in found.items() if config is not None and function is not None}


CONFIGS = _apply_functions()  # of the installed diffusers: what puts each on a model


@dataclass(frozen=True)
class DiffusersCache(Cache):
    """A cache of diffusers: ``enable(pipe, FirstBlockCacheConfig(0.1))`` is short for this around it.

    What ``pipe.transformer.enable_cache`` leaves to the caller is done: SD3, PixArt, DiT and Sana have no cache
    context, so one is entered around every call; halves of guidance in two calls, sizes and batches have states of
    their own, also in the caches that keep one for all; every run begins empty; modules are named for the families
    whose names the default patterns miss; timestep and noise level are told to those that ask for them; FasterCache
    splits all that has two halves; SD3's last block, which gives no text, gets one.

    Attributes:
        config: of diffusers.
        steps: of a run, see :class:`Cache`.

    Its decisions are diffusers': one for the whole batch, so that the images of a batch depend on each other.
    """

    config: object
    steps: int | None = None

    def __post_init__(self):
        if type(self.config) not in CONFIGS:
            names = ", ".join(sorted(config.__name__ for config in CONFIGS))
            raise TypeError(f"DiffusersCache: config is a {type(self.config).__name__}, wanted one of {names}")

    @property
    def name(self) -> str:
        return type(self.config).__name__.removesuffix("Config")

    @property
    def wants_guidance(self) -> bool:
        return not getattr(self.config, "is_guidance_distilled", True)

    def attach(self, transformer: nn.Module, state: CacheState) -> list[tuple[nn.Module, ModelHook]]:
        before = _hooks(transformer)
        last = state.adapter.blocks(transformer)[-1]
        try:
            if getattr(last, "context_pre_only", False):
                HookRegistry.check_if_exists_or_initialize(last).register_hook(_GivesText(state.adapter), _TEXT_HOOK)
            CONFIGS[type(self.config)](transformer, self._completed(transformer, state))
        except ValueError as error:
            remove_new(transformer, before)
            raise ValueError(
                f"shiva_ext: diffusers' {self.name} does not run on {type(transformer).__name__}: {error}"
            ) from error
        except BaseException:
            remove_new(transformer, before)
            raise
        found = [(module, name) for module, name in _hooks(transformer) if (module, name) not in before]
        denoiser = transformer if getattr(self.config, "is_guidance_distilled", False) else None  # does nothing then
        if not any(name != _TEXT_HOOK and module is not denoiser for module, name in found):
            remove_new(transformer, before)
            raise ValueError(
                f"shiva_ext: diffusers' {self.name} found no module of {type(transformer).__name__} to work on"
            )
        registry = HookRegistry.check_if_exists_or_initialize(transformer)
        registry.invalidate_child_registries_cache()
        owned = [module._diffusers_hook.get_hook(name) for module, name in found]
        for (module, _), hook in zip(found, owned, strict=True):
            hook.installed = module.forward  # the last one's counts, see hooks.remove
        branches = _Branches([module for module, _ in found], owned)
        state.undo.append(lambda: [remove(module, name) for module, name in reversed(found)])
        state.on_reset.append(branches.clear)
        state.kept_elsewhere.append(branches.bytes)
        state.branches = branches
        return []

    def _completed(self, transformer: nn.Module, state: CacheState):
        """The config with what it cannot know of this model.

        Raises:
            ValueError: the cache cannot do anything sound on it.
        """
        config, model = self.config, transformer.config
        if type(config).__name__ == "TaylorSeerCacheConfig" and not (config.cache_identifiers or config.use_lite_mode):
            names = {module: name for name, module in transformer.named_modules()}
            sites = [module for found in sites_of(transformer, state.adapter).values() for module, _ in found]
            config = replace(config, cache_identifiers=[re.escape(names[module]) for module in sites])
        if self.name == "SeaCache" and config.raw_vision_callback is None:
            if state.adapter.model_class != "WanTransformer3DModel" or model.in_channels != model.out_channels:
                raise ValueError("it compares videos, and has to be told of these with raw_vision_callback")
        if self.name == "FasterCache" and not config.is_guidance_distilled:
            if state.adapter.model_class == "DiTTransformer2DModel":
                raise ValueError("it wants the unconditional half first, and DiT's pipeline has it last")
            halves = [*config._unconditional_conditional_input_kwargs_identifiers, "pooled_projections"]
            config = replace(config, tensor_format="BCHW", _unconditional_conditional_input_kwargs_identifiers=halves)
        if getattr(config, "current_timestep_callback", 0) is None:
            # FasterCache has nothing to take from at the first call, which may be below its highest timestep.
            config = replace(
                config, current_timestep_callback=lambda: math.inf if state.branches.is_new else state.timestep
            )
        return config

    def transformer_hook(self, state: CacheState, hooks: list[ModelHook]) -> "_ContextHook":
        return _ContextHook(state)

    def check_selection(self, selection) -> None:
        whole = selection.method is None or selection.method.whole_modules
        if self.name not in ("FirstBlockCache", "MagCache", "SeaCache"):
            if selection.method is None or not whole:
                raise ValueError(
                    f"shiva_ext: diffusers' {self.name} keeps outputs of modules for all tokens alike, and the "
                    "selection lets them run on other tokens every step; use SmoothCache or FORA, which keep them by "
                    "token, or FirstBlockCache"
                )
        if selection.stateful is not None:
            raise ValueError(
                f"shiva_ext: {selection.stateful} carries tensors from step to step, and diffusers' {self.name} leaves "
                "out steps without telling; use SmoothCache or FORA"
            )

    def memory_bound(self, layers: int, B: int, N: int, T: int, D: int) -> int:
        orders = 1 + getattr(self.config, "max_order", 1)
        return layers * B * (N + T) * D * 7 * orders


class _ContextHook(CachedTransformerHook):
    """Enters the context of the call's branch of guidance, size and batch, whatever the pipeline has entered."""

    def run(self, module: nn.Module, forward, args: tuple, kwargs: dict):
        state = self.state
        config = state.cache.config
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"shiva_ext: diffusers' {state.cache.name} is not for a compiled transformer here; use SmoothCache or "
                "FORA"
            )
        if not (getattr(config, "is_guidance_distilled", True) or state.guided or state.bypass):
            raise ValueError(
                "shiva_ext: diffusers' FasterCache leaves out the unconditional half of a batch, and this one has "
                "none; give FasterCacheConfig(is_guidance_distilled=True), or batched_guidance=True to enable"
            )
        name, outer = "bypass" if state.bypass else str(state.key), state.context._context
        sigma = state.timestep / 1000 if state.cache.name == "SeaCache" and not state.bypass else None
        context = CacheContext(name, state.step, state.steps, state.level, sigma)
        if outer is not None:
            context = replace(context, **{k: v for k, v in vars(outer).items() if k != "name" and v is not None})
        state.branches.enter(name)
        _set_cache_context(module, context)
        try:
            return forward(*args, **kwargs)
        finally:
            _set_cache_context(module, outer)
            if state.bypass:
                state.branches.drop(name)


class _Branches:
    """The states of diffusers' hooks, one for each branch of guidance, size and batch.

    Most hooks have a manager for that. Those of PyramidAttentionBroadcast and FasterCache have one state for all calls:
    it is exchanged.
    """

    def __init__(self, modules: list[nn.Module], hooks: list[ModelHook]):
        self.modules, self.hooks = modules, hooks
        self.single = [hook for hook in hooks if hook._is_stateful and hasattr(hook, "state")]
        managers = (value for hook in hooks for value in vars(hook).values() if isinstance(value, StateManager))
        self.managers = {id(manager): manager for manager in managers}.values()
        self.states: dict[str, list] = {}
        self.is_new = True  # the branch that was entered last

    def enter(self, name: str) -> None:
        """The coming call is of this branch."""
        self.is_new = name not in self.states
        if self.is_new:
            self.states[name] = [type(hook.state)() for hook in self.single]
        for hook, own in zip(self.single, self.states[name], strict=True):
            hook.state = own

    def drop(self, name: str) -> None:
        """Forget a branch."""
        self.states.pop(name, None)
        for manager in self.managers:
            manager._state_cache.pop(name, None)

    def clear(self) -> None:
        """Forget everything."""
        self.states.clear()
        for module, hook in zip(self.modules, self.hooks, strict=True):
            if hook._is_stateful:
                hook.reset_state(module)

    def bytes(self) -> int:
        """Memory of the tensors in all states."""
        return bytes_of(list(_tensors([[manager._state_cache for manager in self.managers], self.states], set())))


class _GivesText(ModelHook):
    """On a last block that gives no text tokens: gives those that came, as caches subtract them from each other."""

    def __init__(self, adapter):
        super().__init__()
        self.adapter = adapter

    def new_forward(self, module: nn.Module, *args, **kwargs):
        forward = self.fn_ref.original_forward
        text = self.adapter.bind(forward, args, kwargs)["encoder_hidden_states"]
        output = forward(*args, **kwargs)
        return tuple(text if part is None else part for part in output)


def _hooks(transformer: nn.Module) -> list[tuple[nn.Module, str]]:
    registries = [(m, m._diffusers_hook) for m in transformer.modules() if hasattr(m, "_diffusers_hook")]
    return [(module, name) for module, registry in registries for name in registry._hook_order]


def remove_new(transformer: nn.Module, before: list[tuple[nn.Module, str]]) -> None:
    """Take off all hooks that are not in ``before``, the outermost first."""
    known = set(before)
    for module, name in reversed(_hooks(transformer)):
        if (module, name) not in known:
            remove(module, name)


def _tensors(value, seen: set[int]) -> Iterator[Tensor]:
    """The tensors in nested containers and states, each once."""
    if isinstance(value, Tensor):
        if id(value) not in seen:
            seen.add(id(value))
            yield value
        return
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        value = vars(value).values() if hasattr(value, "__dict__") else ()
    for each in value:
        yield from _tensors(each, seen)
