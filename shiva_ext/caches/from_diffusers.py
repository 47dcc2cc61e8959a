"""diffusers' own caches on any model that they can run on, also where its pipeline knows nothing of them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from diffusers import hooks as diffusers_hooks
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import CacheContext, _set_cache_context
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
    context, so one is entered around every call, another for each half of guidance in two calls; every run begins
    empty; modules are named for the families whose names the default patterns miss; the timestep is told to those that
    ask for it; SD3's last block, which gives no text, gets one.

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

    def attach(self, transformer: nn.Module, state: CacheState) -> list[tuple[nn.Module, ModelHook]]:
        before = _hooks(transformer)
        last = state.adapter.blocks(transformer)[-1]
        if getattr(last, "context_pre_only", False):
            HookRegistry.check_if_exists_or_initialize(last).register_hook(_GivesText(state.adapter), _TEXT_HOOK)
        try:
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
        if not any(name != _TEXT_HOOK for _, name in found):
            remove_new(transformer, before)
            raise ValueError(
                f"shiva_ext: diffusers' {self.name} found no module of {type(transformer).__name__} to work on"
            )
        registry = HookRegistry.check_if_exists_or_initialize(transformer)
        registry.invalidate_child_registries_cache()
        state.undo.append(lambda: remove_new(transformer, before))
        owned = [module._diffusers_hook.get_hook(name) for module, name in found]
        for (module, _), hook in zip(found, owned, strict=True):
            hook.installed = module.forward  # the last one's counts, see hooks.remove
        state.on_reset.append(lambda: _reset(found))
        state.kept_elsewhere.append(lambda: sum(_bytes_of_hook(hook) for hook in owned))
        return []

    def _completed(self, transformer: nn.Module, state: CacheState):
        """The config with what it cannot know of this model."""
        config = self.config
        if type(config).__name__ == "TaylorSeerCacheConfig" and not (config.cache_identifiers or config.use_lite_mode):
            names = {module: name for name, module in transformer.named_modules()}
            sites = [module for found in sites_of(transformer, state.adapter).values() for module, _ in found]
            config = replace(config, cache_identifiers=[re.escape(names[module]) for module in sites])
        if getattr(config, "current_timestep_callback", 0) is None:
            config = replace(config, current_timestep_callback=lambda: state.timestep)
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
    """Enters a cache context where the pipeline has not."""

    def run(self, module: nn.Module, forward, args: tuple, kwargs: dict):
        state = self.state
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"shiva_ext: diffusers' {state.cache.name} is not for a compiled transformer here; use SmoothCache or "
                "FORA"
            )
        if state.context._context is not None:
            return forward(*args, **kwargs)
        name = "bypass" if state.bypass else str(state.key)
        _set_cache_context(module, CacheContext(name, state.step, state.steps, timestep=state.level))
        try:
            return forward(*args, **kwargs)
        finally:
            _set_cache_context(module, None)


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


def _reset(found: list[tuple[nn.Module, str]]) -> None:
    for module, name in found:
        hook = module._diffusers_hook.get_hook(name) if hasattr(module, "_diffusers_hook") else None
        if hook is not None and hook._is_stateful:
            hook.reset_state(module)


def _bytes_of_hook(hook: ModelHook) -> int:
    """Memory of the tensors in a hook's state, whichever way it keeps it."""
    seen: set[int] = set()

    def tensors(value, depth: int) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            if id(value) not in seen:
                seen.add(id(value))
                yield value
        elif isinstance(value, dict):
            for each in value.values():
                yield from tensors(each, depth)
        elif isinstance(value, (list, tuple)):
            for each in value:
                yield from tensors(each, depth)
        elif depth and hasattr(value, "__dict__") and not isinstance(value, nn.Module):
            yield from tensors(vars(value), depth - 1)

    return bytes_of(list(tensors({k: v for k, v in vars(hook).items() if k != "fn_ref"}, 3)))
