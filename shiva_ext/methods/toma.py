"""ToMA: destinations by facility location, merging as attention."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from .base import BLOCK, BlockCall, Method, SiteTokens


def tiles_of_tokens(grid: tuple[int, int], tile: int, device) -> tuple[Tensor, Tensor]:
    """The tokens of each whole tile, int64 [tiles, n], and those in none, int64 [rest]: at the right and lower edge."""
    sides = [min(tile, side) for side in grid]
    index = torch.arange(grid[0] * grid[1], device=device).view(grid)
    height, width = (side // each * each for side, each in zip(grid, sides, strict=True))
    whole = index[:height, :width].reshape(height // sides[0], sides[0], width // sides[1], sides[1])
    rest = torch.cat([index[:height, width:].flatten(), index[height:].flatten()])
    return whole.transpose(1, 2).reshape(-1, sides[0] * sides[1]), rest


@dataclass(frozen=True)
class AttentionMerge:
    """A soft assignment of the tokens of each tile to its destinations; tokens in no tile stay as they are.

    Attributes:
        leaders: int64 [B,M], the destinations and the tokens in no tile, ascending.
        order, back: int64 [N]: tile by tile, then the rest, and back.
        weights: [B,T,k,n]: over the destinations they sum to 1.
        rank, place: int64 [B,M]: the leaders' rows among those that come tile by tile, and back.
    """

    leaders: Tensor
    order: Tensor
    back: Tensor
    weights: Tensor
    rank: Tensor
    place: Tensor

    def merge(self, x: Tensor) -> Tensor:
        B, T, k, n = self.weights.shape
        ordered = x.index_select(1, self.order)
        weights = (self.weights / self.weights.sum(dim=-1, keepdim=True)).flatten(0, 1).to(x.dtype)
        merged = torch.bmm(weights, ordered[:, : T * n].reshape(B * T, n, -1)).view(B, T * k, -1)
        return _rows(torch.cat([merged, ordered[:, T * n :]], dim=1), self.rank)

    def unmerge(self, y: Tensor) -> Tensor:
        B, T, k, n = self.weights.shape
        ordered = _rows(y, self.place)
        tiles = ordered[:, : T * k].reshape(B * T, k, -1)
        spread = torch.bmm(self.weights.flatten(0, 1).transpose(1, 2).to(y.dtype), tiles).view(B, T * n, -1)
        return torch.cat([spread, ordered[:, T * k :]], dim=1).index_select(1, self.back)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows [B,M] of x [B,M,D]."""
    return x.gather(1, index[..., None].expand_as(x))


@dataclass(frozen=True)
class ToMA(Method):
    """Token merge with attention (arXiv 2509.10918; code github.com/WenboLuu/ToMA, abstract read).

    In each tile of the image a greedy facility location chooses destinations; the others are assigned to them by a
    softmax over the destinations, and what these give is spread by the transpose of it.

    Attributes:
        ratio: share of the tokens to merge, in [0, 1); destinations are the rest of each tile, rounded, at least one.
        tile: side of a tile; tokens of the last rows and columns that fill none are left alone. The published Flux run
            has 4.
        scale: of the cosine in the softmax; 1000 is nearly a hard assignment.
        reuse_steps: steps that share destinations and assignment. The published code makes it a setting; 3 is from its
            Flux run, as we read it.
        reuse_blocks: whether the blocks of one class share them in a step, so that only the first computes any.
        sites, first_layer: the published Flux run leaves 5 blocks of each kind dense, and merges around attention in
            joint blocks, around both in single ones.
    """

    ratio: float = 0.5
    tile: int = 4
    scale: float = 1000.0
    reuse_steps: int = 3
    reuse_blocks: bool = True
    sites: tuple[str, ...] = (BLOCK,)
    first_layer: int = 1

    def __post_init__(self):
        self._check()
        for name in ("tile", "reuse_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"ToMA: {name} is {getattr(self, name)}, wanted at least 1")
        if not self.scale > 0:
            raise ValueError(f"ToMA: scale is {self.scale}, wanted a positive number")

    def _kept(self, n: int) -> int:
        return max(1, round((1 - self.ratio) * n))

    def tokens(self, layer: int, N: int, step: int, steps: int) -> SiteTokens:
        n = min(self.tile**2, N)
        return self._site_tokens(layer, N, N * self._kept(n) // n)

    def matching_flops(self, N: int, D: int) -> int:
        n = min(self.tile**2, N)
        found = 2 * N * n * D // self.reuse_steps  # and by one block of a step alone, if they share
        return (0 if self.reuse_blocks else found) + 2 * 2 * N * self._kept(n) * D * len(self.sites)

    def run_block(self, call: BlockCall):
        if self.ratio == 0:
            return call.dense()
        key = ("toma", call.kind if self.reuse_blocks else call.layer)
        step, merge = call.memory.get(*key) or (None, None)
        if step is None or call.memory.step - step >= self.reuse_steps:
            step, merge = call.memory.step, self.match(call.x, call.grid)
            call.memory.set(*key, value=(step, merge))
        return call.around(dict.fromkeys(self.sites, merge))

    def match(self, x: Tensor, grid: tuple[int, int]) -> AttentionMerge:
        """Destinations and assignment for tokens x [B,N,D]."""
        tiles, rest = tiles_of_tokens(grid, self.tile, x.device)
        T, n = tiles.shape
        unit = F.normalize(x.index_select(1, tiles.flatten()).float(), dim=-1).view(len(x), T, n, -1)
        similarity = unit @ unit.transpose(-1, -2)
        chosen = ops.facility_location(similarity.flatten(0, 1), self._kept(n)).view(len(x), T, -1)  # [B,T,k]
        logits = similarity.gather(2, chosen[..., None].expand(*chosen.shape, n))
        destinations = tiles.expand(len(x), T, n).gather(2, chosen).flatten(1)
        leaders, rank = torch.cat([destinations, rest.expand(len(x), -1)], dim=1).sort(dim=1)
        order = torch.cat([tiles.flatten(), rest])
        weights = torch.softmax(self.scale * logits, dim=2)
        return AttentionMerge(leaders, order, order.argsort(), weights, rank, rank.argsort(dim=1))
