"""DiffCR: layers learn how many tokens they keep at which noise levels, by mixing two runs of themselves."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from ..models import ModelAdapter
from .base import BLOCK, BlockCall, SiteTokens
from .trained import TrainedMethod, linear32, mix

_BIN = 10  # bins to the whole: keep ratios are multiples of a tenth


class DiffCRWeights(nn.Module):
    """A token router a layer, and the keep ratios.

    Attributes:
        routers: one linear layer D to 1 a block.
        keep: [L,regions], from 1, which keeps all, downwards.
    """

    def __init__(self, num_layers: int, dim: int, regions: int, bias: float):
        super().__init__()
        self.routers = nn.ModuleList(nn.Linear(dim, 1) for _ in range(num_layers))
        for router in self.routers:
            nn.init.normal_(router.weight, std=0.02)
            nn.init.constant_(router.bias, bias)
        self.keep = nn.Parameter(torch.ones(num_layers, regions))
        self._learned: list[list[float]] | None = None

    def learned(self, layer: int, region: int) -> float:
        """A keep ratio as a Python number; after training no GPU is asked for it."""
        return float(self.keep[layer, region]) if self._learned is None else self._learned[layer][region]


@dataclass(frozen=True)
class DiffCR(TrainedMethod):
    """Differentiable token compression (arXiv 2412.16822; its pseudo-code).

    A token is scored by a sigmoid of a linear layer; the best go through the whole block, whose update is multiplied by
    the score, and the others pass it by. The share that is kept is learned for each layer and region of the noise
    level: in training the layer runs at the two tenths around it, and their outputs are mixed; later it runs once, at
    the nearest tenth.

    Attributes:
        budget: wanted mean of the keep ratios.
        regions: intervals of the noise level with ratios of their own.
        lowest: least keep ratio.
        ratio_weight: factor of the squared distance of the mean ratio to the budget. Published is .3 at the start;
            the rule that raises it is not, and at .3 throughout some thousand steps end far from the budget.
        bias: of the fresh routers. At 3 a score is .95: near the dense model at the start.
        shift: is added to the learned ratios after training, to make them stronger or weaker.
        first_layer: blocks before it stay dense.
    """

    budget: float = 0.6
    regions: int = 4
    lowest: float = 0.3
    ratio_weight: float = 3.0
    bias: float = 3.0
    shift: float = 0.0
    first_layer: int = 0

    sites, needs_grid = (BLOCK,), False
    training_only = ("budget", "ratio_weight", "bias")

    def __post_init__(self):
        if not (0.1 <= self.lowest <= self.budget <= 1):
            raise ValueError(
                f"DiffCR: budget is {self.budget} and lowest {self.lowest}, wanted .1 <= lowest <= budget <= 1"
            )
        if self.regions < 1:
            raise ValueError(f"DiffCR: regions is {self.regions}, wanted at least 1")
        if not -1 <= self.shift <= 1:
            raise ValueError(f"DiffCR: shift is {self.shift}, wanted a change of the keep ratios in [-1, 1]")

    @classmethod
    def for_budget(cls, budget: float, adapter: ModelAdapter, transformer: nn.Module) -> "DiffCR":
        return cls(budget=budget, lowest=min(0.3, budget))

    def build(self, adapter: ModelAdapter, transformer: nn.Module) -> DiffCRWeights:
        dims = adapter.dims(transformer)
        return DiffCRWeights(dims["num_layers"], dims["dim"], self.regions, self.bias)

    def prepare(self, weights: DiffCRWeights) -> None:
        weights._learned = weights.keep.tolist()

    def schedule_weights(self, weights: DiffCRWeights) -> list[nn.Parameter]:
        return [weights.keep]

    def constrain(self, weights: DiffCRWeights) -> None:
        with torch.no_grad():
            weights.keep.clamp_(self.lowest, 1.0)

    def penalty(self, weights: DiffCRWeights, scratch, progress: float) -> Tensor:
        return self.ratio_weight * (weights.keep[self.first_layer :].mean() - self.budget).square()

    def region(self, sigma: float) -> int:
        """The interval that a noise level in [0, 1] lies in."""
        return min(int(sigma * self.regions), self.regions - 1)

    def nearest_bin(self, weights: DiffCRWeights, layer: int, sigma: float) -> float:
        """The share that a layer keeps after training."""
        keep = weights.learned(layer, self.region(sigma)) + self.shift
        return min(max(round(keep * _BIN), math.ceil(self.lowest * _BIN)), _BIN) / _BIN

    def count(self, N: int, share: float) -> int:
        """Tokens that a bin keeps."""
        return min(math.ceil(share * N - 1e-6), N)

    def processed(self, weights: DiffCRWeights, layer: int, N: int, sigma: float) -> SiteTokens:
        k = self.count(N, self.nearest_bin(weights, layer, sigma)) if layer >= self.first_layer else N
        return SiteTokens(k, k)

    def matching_flops(self, N: int, D: int) -> int:
        return 2 * N * D

    def run_block(self, call: BlockCall):
        weights, N = call.weights, call.x.shape[1]
        score = torch.sigmoid(linear32(weights.routers[call.layer], call.x))[..., 0]
        if not call.training:
            share = self.nearest_bin(weights, call.layer, call.sigma)
            return self.branch(call, score, self.count(N, share))
        keep = weights.keep[call.layer, self.region(call.sigma)]
        upper = max(math.ceil(float(keep.detach()) * _BIN - 1e-6), 2)
        outputs = [self.branch(call, score, self.count(N, bin_ / _BIN)) for bin_ in (upper - 1, upper)]
        return mix(*outputs, keep * _BIN - (upper - 1))

    def branch(self, call: BlockCall, score: Tensor, k: int):
        """The block on the k tokens of the highest score [B,N]; the others stay as they are."""
        N = call.x.shape[1]
        if k == N:
            output = call.run(call.x)
            return call.replaced(output, self._weighted(call.x, call.tokens_of(output), score))
        kept = ops.topk_select(score.detach(), k)[0]
        call.record(kept, (BLOCK,))
        before = ops.token_gather(call.x, kept)
        output = call.run(before, kept)
        after = self._weighted(before, call.tokens_of(output), score.gather(1, kept))
        return call.replaced(output, ops.token_scatter(call.x, kept, after))

    @staticmethod
    def _weighted(before: Tensor, after: Tensor, score: Tensor) -> Tensor:
        """The update times the score; at a score of 1 exactly what the block gave."""
        after = after.to(before.dtype)
        return torch.lerp(before, after, score[..., None].to(before.dtype).expand_as(after))
