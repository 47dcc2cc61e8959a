"""What a method with weights of its own is made of, beside what every method is."""

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models import ModelAdapter
from .base import BlockCall, Method, SiteTokens


class TrainedMethod(Method):
    """A method that is trained together with adapters of the model, see :mod:`shiva_ext.training.method_trainer`.

    A subclass is a frozen dataclass of settings; its weights are a module apart, in ``BlockCall.weights``.

    Attributes:
        regions: of a training step all samples of one call come from one of so many equal intervals of the noise level,
            for methods whose token counts depend on it; 1 lets every sample have its own.
        training_only: settings that change nothing once it is trained.
    """

    stateful = False
    regions = 1
    training_only: tuple[str, ...] = ()

    @classmethod
    @abstractmethod
    def for_budget(cls, budget: float, adapter: ModelAdapter, transformer: nn.Module) -> "TrainedMethod":
        """The settings to train with so that about this share of the blocks' work is left, in (0, 1]."""

    @abstractmethod
    def build(self, adapter: ModelAdapter, transformer: nn.Module) -> nn.Module:
        """Fresh weights for a model.

        Raises:
            TypeError: the method is not for this family.
            ValueError: its settings do not fit the model.
        """

    def penalty(self, weights: nn.Module, scratch: Mapping, progress: float) -> Tensor | None:
        """The method's own loss after a training call.

        Args:
            weights: of the method.
            scratch: what the call's blocks left in ``BlockCall.scratch``.
            progress: share of the training steps that are done.
        """
        return None

    def dense_weight(self, progress: float) -> float:
        """Factor of the loss of a second pass with the method off and the adapters on; 0 makes none."""
        return 0.0

    def constrain(self, weights: nn.Module) -> None:
        """Bring weights back into their range after an update."""

    def prepare(self, weights: nn.Module) -> None:  # noqa: B027
        """The training is done: read from the weights what is wanted as Python numbers."""

    def schedule_weights(self, weights: nn.Module) -> list[nn.Parameter]:
        """Those that set how much is kept, which learn at the ratio policy's rate; the others at the router's."""
        return []

    def matching_flops(self, N: int, D: int) -> int:
        return 0

    def tokens(self, layer: int, N: int, step: int, steps: int) -> SiteTokens:
        return SiteTokens(N, N)

    def processed(self, weights: nn.Module, layer: int, N: int, sigma: float) -> SiteTokens:
        """Tokens that a block's attention and MLP process at a noise level in [0, 1].

        All of them where the image decides, too: an upper bound.
        """
        return SiteTokens(N, N)


def linear32(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer in float32, whatever autocast or the tokens' dtype say.

    In half precision many tokens' scores would be equal, and the first of them win.
    """
    with torch.autocast(x.device.type, enabled=False):
        bias = None if layer.bias is None else layer.bias.float()
        return F.linear(x.float(), layer.weight.float(), bias)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of ``hard`` with the gradient of ``soft``."""
    return hard + (soft - soft.detach())


def mix(low, high, share: Tensor):
    """(1 - share) * low + share * high of everything in two outputs of a block."""
    if low is None:
        return None
    if isinstance(low, tuple):
        return tuple(mix(a, b, share) for a, b in zip(low, high, strict=True))
    return torch.lerp(low, high, share.to(low.dtype))


__all__ = ["BlockCall", "TrainedMethod", "linear32", "mix", "straight_through"]
