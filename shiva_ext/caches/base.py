"""What a cache is made of: settings, hooks on a model's blocks or their parts, and one hook on the model."""

from abc import ABC, abstractmethod

import torch
from diffusers.hooks import ModelHook
from torch import nn

from .state import CacheState

HOOK_NAME = "shiva_ext_cache"  # around the selection's, which has another name


class Cache(ABC):
    """A method that computes a part of some steps and takes the rest from earlier ones; a source for ``enable``.

    A subclass is a frozen dataclass of settings.

    Attributes:
        steps: of a run; by default what the pipeline's scheduler says. A transformer without one wants it.
        wants_guidance: whether it matters that a batch is (unconditional, conditional).
    """

    wants_guidance = True
    steps: int | None

    @property
    def name(self) -> str:
        """As printed."""
        return type(self).__name__

    @abstractmethod
    def attach(self, transformer: nn.Module, state: CacheState) -> list[tuple[nn.Module, ModelHook]]:
        """Hooks for modules inside the transformer.

        Raises:
            TypeError: the cache is not for this family.
            ValueError: its settings do not fit the model.
        """

    def transformer_hook(self, state: CacheState, hooks: list[ModelHook]) -> "CachedTransformerHook":
        """The hook of the transformer itself, beside these inside it."""
        return CachedTransformerHook(state)

    def begin_step(self, step: int, steps: int) -> tuple:
        """What hooks have to know of a step, as Python values that a compiler can rely on.

        Raises:
            ValueError: the settings are for runs of another length.
        """
        return ()

    def check_scheduler(self, scheduler) -> None:  # noqa: B027
        """Refuse a scheduler that the settings were not made for.

        Raises:
            ValueError: it is another.
        """

    def check_selection(self, selection) -> None:  # noqa: B027
        """Refuse to run with a token selection that makes no sense beside the cache.

        Args:
            selection: a :class:`~shiva_ext.selection_state.SelectionState`.

        Raises:
            ValueError: it is such a one.
        """

    @abstractmethod
    def memory_bound(self, layers: int, B: int, N: int, T: int, D: int) -> int:
        """Numbers stored at most for one call of a step, for N image tokens and T text tokens of D channels."""


class CachedTransformerHook(ModelHook):
    """On the whole transformer: tells the other hooks which step it is."""

    _is_stateful = True

    def __init__(self, state: CacheState):
        super().__init__()
        self.state, self.context = state, state.context  # diffusers finds the context among a hook's attributes

    def new_forward(self, module: nn.Module, *args, **kwargs):
        state, forward = self.state, self.fn_ref.original_forward
        if state.watch is not None and not torch.compiler.is_compiling():
            state.watch.refresh()
        arguments = state.adapter.bind(forward, args, kwargs)
        state.begin(arguments)
        try:
            output = self.run(module, forward, args, kwargs)
        except BaseException:
            state.new_run()  # what was stored may be half of a step
            state.broken = True
            raise
        if not torch.compiler.is_compiling():
            state.peak_bytes = max(state.peak_bytes, state.bytes)
        return output

    def run(self, module: nn.Module, forward, args: tuple, kwargs: dict):
        """Run the transformer."""
        return forward(*args, **kwargs)

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.state.new_run()
        return module


def block_passing(adapter, arguments: dict, tokens):
    """What a block that did not run gives: these image tokens, and the text tokens that came to it."""
    if adapter.image_output is None:
        return tokens
    text = arguments.get("encoder_hidden_states")
    return (text, tokens) if adapter.image_output == 1 else (tokens, text)
