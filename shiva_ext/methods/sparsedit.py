"""SparseDiT: blocks that only average, stretches of blocks on a pooled image, and blocks that bring the rest back."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from ..models import ModelAdapter
from .base import ATTENTION, MLP, BlockCall, SiteTokens
from .parts import attention, check_parts, mean_attention
from .trained import TrainedMethod

POOL, GENERATE, SPARSE, RECOVER, DENSE = "pool", "generate", "sparse", "recover", "dense"


def default_roles(num_layers: int) -> tuple[str, ...]:
    """What each block does: the published 2 + 4 x (1, 3, 1, 1) + 2 for 28 blocks, in proportion for others.

    With few blocks: one that averages, one stretch on the pooled image, one dense block at the end.
    """
    if num_layers < 5:
        raise ValueError(f"SparseDiT: the model has {num_layers} blocks, wanted at least 5")
    ends = 2 if num_layers >= 16 else 1
    inner = num_layers - 2 * ends
    stretches = max(1, round(inner / 6))
    roles: list[str] = []
    for i in range(stretches):
        length = inner * (i + 1) // stretches - inner * i // stretches
        dense = [DENSE] if length >= 5 else []
        roles += [GENERATE, *[SPARSE] * (length - 2 - len(dense)), RECOVER, *dense]
    return (*[POOL] * ends, *roles, *[DENSE] * ends)


class SparseWeights(nn.Module):
    """What recovery adds to the model.

    Attributes:
        roles: of the blocks.
        sparse, dense: by layer, W1 (zero at the start) of the upsampled tokens and W2 (the identity) of the dense ones.
        position: by layer, factor of the positions that are added where the density changes, zero at the start.
    """

    def __init__(self, roles: tuple[str, ...], dim: int):
        super().__init__()
        self.roles = roles
        recover = [str(i) for i, role in enumerate(roles) if role == RECOVER]
        self.sparse = nn.ModuleDict({i: nn.Linear(dim, dim, bias=False) for i in recover})
        self.dense = nn.ModuleDict({i: nn.Linear(dim, dim, bias=False) for i in recover})
        for i in recover:
            nn.init.zeros_(self.sparse[i].weight)
            nn.init.eye_(self.dense[i].weight)
        self.stretches: list[range] = []
        for i, role in enumerate(roles):
            if role == RECOVER:
                start = max(j for j in range(i) if roles[j] == GENERATE)
                self.stretches.append(range(start, i + 1))
        changes = [str(i) for i, role in enumerate(roles) if role in (GENERATE, RECOVER)]
        self.position = nn.ParameterDict({i: nn.Parameter(torch.zeros(())) for i in changes})

    def stretch(self, layer: int) -> range | None:
        """The blocks from "generate" to "recover" that a layer is among."""
        return next((each for each in self.stretches if layer in each), None)


@dataclass(frozen=True)
class SparseDiT(TrainedMethod):
    """Token sparsification in space and time (arXiv 2412.06028; code github.com/changsn/SparseDiT, without schedule).

    The image's tokens are averaged to a coarser grid, which attends to the fine one; some blocks run on it; then it is
    spread and added to the fine one, which attends to it. The grid is coarsest in the first quarter of the noise
    levels, from pure noise on, and grows linearly from there.

    Attributes:
        high, low: share of the tokens that the coarse grid lacks, in the first quarter and at the end. Published for
            256 tokens: 6 x 6 to 10 x 10 of 16 x 16, .86 to .61.
        roles: of each block: "pool" (its attention gives every token the mean of all values), "generate", "sparse",
            "recover", "dense"; empty for :func:`default_roles`.
        regions: intervals of the noise level in training, each with one grid.
        first_layer: blocks before it stay dense.
    """

    high: float = 0.86
    low: float = 0.61
    roles: tuple[str, ...] = ()
    regions: int = 8
    first_layer: int = 0

    sites = (ATTENTION, MLP)
    whole_modules = False  # some blocks run on the pooled tokens
    training_only = ("regions",)

    def __post_init__(self):
        if not 0 <= self.low <= self.high < 1:
            raise ValueError(f"SparseDiT: low is {self.low} and high {self.high}, wanted 0 <= low <= high < 1")
        object.__setattr__(self, "roles", tuple(self.roles))  # a list, where it comes from a file
        unknown = [role for role in self.roles if role not in (POOL, GENERATE, SPARSE, RECOVER, DENSE)]
        if unknown:
            raise ValueError(f"SparseDiT: unknown role {unknown[0]!r}, wanted pool, generate, sparse, recover, dense")
        inside = False
        for role in self.roles:
            if (role in (SPARSE, RECOVER)) != inside:
                raise ValueError(
                    f"SparseDiT: roles {self.roles} are in no order: 'generate', some 'sparse', 'recover', and nothing "
                    "else between"
                )
            inside = role in (GENERATE, SPARSE)
        if inside:
            raise ValueError(f"SparseDiT: roles {self.roles} end on the coarse grid; wanted a 'recover'")

    @classmethod
    def for_budget(cls, budget: float, adapter: ModelAdapter, transformer: nn.Module) -> "SparseDiT":
        roles = default_roles(adapter.dims(transformer)["num_layers"])
        # The mean over the sampling is high - 3/8 (high - low); the blocks that run on the coarse grid carry it all.
        possible = sum(role in (GENERATE, SPARSE) for role in roles) / len(roles)
        middle = (1 - budget) / possible
        if middle > 0.9:
            raise ValueError(
                f"SparseDiT: budget is {budget}, but {len(roles)} blocks with their usual roles come down to no less "
                f"than {1 - 0.9 * possible:.2f}; give other roles, or a larger budget"
            )
        return cls(high=min(middle + 0.09, 0.95), low=max(middle - 0.15, 0.0), roles=roles)

    def build(self, adapter: ModelAdapter, transformer: nn.Module) -> SparseWeights:
        check_parts("SparseDiT", adapter, transformer)
        dims = adapter.dims(transformer)
        if self.roles and len(self.roles) != dims["num_layers"]:
            raise ValueError(
                f"SparseDiT: roles for {len(self.roles)} blocks, the model has {dims['num_layers']}; give roles=() "
            )
        weights = SparseWeights(self.roles or default_roles(dims["num_layers"]), dims["dim"])
        cut = [each for each in weights.stretches if each[0] < self.first_layer <= each[-1]]
        if cut:
            raise ValueError(
                f"SparseDiT: first_layer is {self.first_layer}, inside the stretch of blocks {cut[0][0]} to "
                f"{cut[0][-1]}; wanted one before or behind it"
            )
        return weights

    def rate(self, progress: float) -> float:
        """Share of the tokens that the coarse grid lacks, at a place in the sampling: 1 - the noise level."""
        if progress < 0.25:
            return self.high
        return (4 - 4 * progress) / 3 * self.high + (4 * progress - 1) / 3 * self.low

    def coarse_grid(self, grid: tuple[int, int], progress: float) -> tuple[int, int]:
        """Height and width of the coarse grid."""
        side = (1 - self.rate(progress)) ** 0.5
        return max(1, round(grid[0] * side)), max(1, round(grid[1] * side))

    def run_block(self, call: BlockCall):
        role, stretch = call.weights.roles[call.layer], call.weights.stretch(call.layer)
        if stretch and (
            call.grid == self.coarse_grid(call.grid, 1 - call.sigma) or set(call.skipped) & {stretch[0], stretch[-1]}
        ):
            return call.dense()  # as fine as the image; or its first or last block is skipped
        if role == POOL:
            return call.with_plan({ATTENTION: lambda module, forward, x, text=None: mean_attention(module, x, text)})
        if role == GENERATE:
            return self._generate(call)
        if role == RECOVER:
            return self._recover(call, stretch[0])
        return call.dense()

    def _generate(self, call: BlockCall):
        coarse = self.coarse_grid(call.grid, 1 - call.sigma)
        call.scratch["fine", call.layer] = call.x
        pooled = F.adaptive_avg_pool2d(_picture(call.x, call.grid), coarse).flatten(2).transpose(1, 2)
        return _attending(call, pooled + self._position(call, coarse), call.x)

    def _recover(self, call: BlockCall, generated: int):
        fine, layer = call.scratch["fine", generated], str(call.layer)
        coarse = self.coarse_grid(call.grid, 1 - call.sigma)
        spread = F.interpolate(_picture(call.x, coarse), size=call.grid, mode="nearest").flatten(2).transpose(1, 2)
        first, second = call.weights.sparse[layer].weight, call.weights.dense[layer].weight
        x = F.linear(spread, first.to(spread.dtype)) + F.linear(fine, second.to(fine.dtype))
        return _attending(call, x.to(fine.dtype) + self._position(call, call.grid), call.x)

    def _position(self, call: BlockCall, grid: tuple[int, int]) -> Tensor:
        """Sines and cosines of the places of a grid's tokens, [1,M,D]."""
        table = _positions(call.x.shape[-1], grid, max(call.grid)).to(call.x.device)
        return (call.weights.position[str(call.layer)] * table).to(call.x.dtype)[None]

    def processed(self, weights: SparseWeights, layer: int, N: int, sigma: float) -> SiteTokens:
        side = round(N**0.5)
        height, width = self.coarse_grid((side, side), 1 - sigma)
        return SiteTokens(*[height * width if weights.roles[layer] in (GENERATE, SPARSE) else N] * 2)


@lru_cache(maxsize=64)  # it is slow, and the same in every step of every run
def _positions(dim: int, grid: tuple[int, int], size: int) -> Tensor:
    """float32 [height * width, dim], for places from 0 to ``size``."""
    return get_2d_sincos_pos_embed(dim, grid, base_size=size, output_type="pt", device=torch.device("cpu")).float()


def _picture(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens [B,N,D] as channels of an image [B,D,height,width]."""
    return x.transpose(1, 2).unflatten(2, grid)


def _attending(call: BlockCall, asking: Tensor, asked: Tensor):
    """A block on some tokens [B,M,D] whose attention sees others [B,n,D].

    Both go through the block's own norms side by side; the MLP and the output are of the first alone.
    """
    M = asking.shape[1]

    def padded(y: Tensor) -> Tensor:
        return F.pad(y, (0, 0, 0, asked.shape[1]))

    def attend(module, forward, x, text=None):
        found = attention(module, x[:, :M], text, keys=x[:, M:])
        return padded(found) if text is None else (padded(found[0]), found[1])

    def mlp(module, forward, x):
        return padded(forward(x[:, :M]))

    output = call.with_plan({ATTENTION: attend, MLP: mlp}, torch.cat([asking, asked.to(asking.dtype)], dim=1))
    return call.replaced(output, call.tokens_of(output)[:, :M])
