"""A cache on a model: put on, taken off, and kept outermost of all hooks."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .caches import Cache
from .caches.base import HOOK_NAME
from .caches.state import CacheState
from .hooks import detach, install
from .models import adapter_for
from .scheduler_watch import SchedulerWatch

_CACHE = "_shiva_ext_cache"


class CacheHandle:
    """What :func:`shiva_ext.enable` returns for a cache.

    Attributes:
        transformer: the hooked model.
        cache: its settings.
        num_hooked: hooked modules inside the transformer.
    """

    def __init__(self, transformer: nn.Module, state: CacheState):
        self.transformer, self.state, self.cache = transformer, state, state.cache
        self.num_hooked, self.off = 0, False

    @property
    def bytes(self) -> int:
        """Memory that is held now. It is given back as a run ends."""
        return self.state.bytes

    @property
    def peak_bytes(self) -> int:
        """The most memory that was held at the end of a call since the cache was enabled."""
        return self.state.peak_bytes

    def reset(self) -> None:
        """Forget everything, as at the beginning of a run. A pipeline does so by itself."""
        self.state.forget()

    def disable(self) -> None:
        """Take the cache off; a selection of tokens stays. Harmless if done before."""
        if get_cache(self.transformer) is self:
            self._detach()
            self._retire()
            delattr(self.transformer, _CACHE)

    def _retire(self) -> None:
        self.state.forget()
        if self.state.watch is not None:
            self.state.watch.remove()

    def __enter__(self) -> "CacheHandle":
        return self

    def __exit__(self, *error) -> None:
        self.disable()

    def _attach(self) -> None:
        state = self.state
        try:
            hooks = state.cache.attach(self.transformer, state)
            for module, hook in hooks:
                install(module, hook, HOOK_NAME)
            install(self.transformer, state.cache.transformer_hook(state, [hook for _, hook in hooks]), HOOK_NAME)
        except BaseException:
            self._detach()
            raise
        self.num_hooked = len(hooks)

    def _detach(self) -> None:
        detach(self.transformer, HOOK_NAME)
        while self.state.undo:
            self.state.undo.pop()()
        for kept in (self.state.stores, self.state.on_reset, self.state.kept_elsewhere):
            kept.clear()


def get_cache(transformer: nn.Module) -> CacheHandle | None:
    """The handle of a transformer's cache, if it has one."""
    return getattr(transformer, _CACHE, None)


def enable_cache(pipe_or_transformer, transformer: nn.Module, cache: Cache, batched_guidance: bool | None, selection):
    """Put a cache around all that a transformer has, in place of one that is there.

    Args:
        selection: state of the token selection on the transformer, or None.

    Raises:
        TypeError, ValueError: the cache does not fit the model, its scheduler or the selection; nothing was changed.
    """
    bare = pipe_or_transformer is transformer or not hasattr(pipe_or_transformer, "scheduler")
    if bare and cache.steps is None:
        raise ValueError(
            f"shiva_ext: {cache.name} has to know its place in the run; enable it on a pipeline, or say how many steps "
            f"a run has: {cache.name}(..., steps=N)"
        )
    if selection is not None:
        cache.check_selection(selection)
    if not bare:
        cache.check_scheduler(pipe_or_transformer.scheduler)
    state = CacheState(cache, adapter_for(transformer), bool(batched_guidance))
    state.selection = selection
    handle, before = CacheHandle(transformer, state), get_cache(transformer)
    if before is not None:
        before._detach()
    try:
        handle._attach()
        if not bare:
            known = batched_guidance if cache.wants_guidance else bool(batched_guidance)
            state.watch = SchedulerWatch(pipe_or_transformer, state, known)
    except BaseException:
        handle._detach()
        if before is not None:
            before._attach()
        raise
    if before is not None:
        before._retire()
    setattr(transformer, _CACHE, handle)
    return handle


@contextmanager
def cache_taken_off(transformer: nn.Module) -> Iterator[CacheHandle | None]:
    """Take a transformer's cache off while other hooks come or go, and put it around them again.

    Hooks can only be removed from the outside inwards, and a cache has to be around a selection: it leaves out what the
    selection would do.
    """
    handle = get_cache(transformer)
    if handle is None or handle.off:
        yield handle
        return
    handle._detach()
    handle.off = True
    try:
        yield handle
    finally:
        handle.off = False
        handle.state.new_run()
        handle._attach()
