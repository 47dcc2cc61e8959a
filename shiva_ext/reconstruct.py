"""What the tokens that a block did not process get from it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from . import ops
from .methods.memory import RunMemory

IDENTITY, NEAREST, LAST, COARSE = "identity", "nearest", "last", "coarse"
CHOICES = (IDENTITY, NEAREST, LAST, COARSE)
WINDOW = 4  # side of the squares whose rejected tokens become one with "coarse"
_ROWS = 1 << 22  # distances at a time


def nearest_kept(kept: Tensor, grid: tuple[int, int]) -> Tensor:
    """For each token the kept one that is nearest in the image, as its position in ``kept``; int64 [B,N].

    Args:
        kept: int64 [B,k], ascending; of equally near ones the first counts.
        grid: height and width in tokens.
    """
    N, B = grid[0] * grid[1], len(kept)
    place = torch.arange(N, device=kept.device)
    place = torch.stack([place // grid[1], place % grid[1]], dim=-1)
    found = []
    for some in place.split(max(1, _ROWS // (B * kept.shape[1]))):
        offset = some[None, :, None] - place[kept][:, None]
        found.append(offset.square().sum(dim=-1).argmin(dim=-1))
    return torch.cat(found, dim=1)


def reconstruct(
    how: str, x: Tensor, kept: Tensor, processed: Tensor, grid: tuple[int, int], memory: RunMemory, layer: int
) -> Tensor:
    """All tokens after a block that processed the kept ones.

    Args:
        how: "identity" leaves a rejected token as it is; "nearest" adds to it what the block added to the nearest kept
            token; "last" adds what the block added to the token itself when it was last kept in this run, if it was.
        x: [B,N,D], tokens at the block's entry.
        kept: int64 [B,k].
        processed: [B,k,D], the block's output for them.
        grid: height and width in tokens.
        memory: of the run.
        layer: index of the block.
    """
    if how == IDENTITY:
        return ops.token_scatter(x, kept, processed)
    update = processed - ops.token_gather(x, kept)
    if how == NEAREST:
        k = kept.shape[1]
        rows = nearest_kept(kept, grid) + torch.arange(len(x), device=x.device)[:, None] * k
        return x + update.flatten(0, 1).index_select(0, rows.flatten()).view_as(x)
    before = memory.get("update", layer)
    updates = ops.token_scatter(torch.zeros_like(x) if before is None else before, kept, update)
    memory.set("update", layer, value=updates.detach())
    return x + updates


def num_squares(grid: tuple[int, int], window: int = WINDOW) -> int:
    """Tokens that "coarse" adds to each pruned block."""
    return -(-grid[0] // window) * -(-grid[1] // window)


class Coarse:
    """The rejected tokens of each square of the image as one token, which goes through the block with the kept ones.

    Attributes:
        tokens: [B,M,D]: the mean of a square's rejected tokens; of all its tokens where none is rejected.
        places: int64 [B,M], the middle token of each square: whose positions it takes.
        square: int64 [N], the square of each token.
    """

    def __init__(self, x: Tensor, kept: Tensor, grid: tuple[int, int], window: int = WINDOW):
        height, width = grid
        rows, columns = -(-height // window), -(-width // window)
        place = torch.arange(height * width, device=x.device)
        self.square = place // width // window * columns + place % width // window
        middle = [
            torch.arange(n, device=x.device).mul(window).add(window // 2).clamp(max=side - 1)
            for n, side in ((rows, height), (columns, width))
        ]
        self.places = (middle[0][:, None] * width + middle[1]).flatten().expand(len(x), -1)
        left = torch.ones(len(x), height * width, dtype=x.dtype, device=x.device).scatter_(1, kept, 0)
        share = self._means(left[..., None], grid, window)
        means = self._means(x * left[..., None], grid, window) / share.clamp_min(1e-6)
        self.tokens = torch.where(share > 0, means, self._means(x, grid, window))

    @staticmethod
    def _means(x: Tensor, grid: tuple[int, int], window: int) -> Tensor:
        """[B,N,C] to [B,M,C]; squares at the right and lower edge may be smaller."""
        image = x.transpose(1, 2).unflatten(2, grid)
        pooled = F.avg_pool2d(image, window, ceil_mode=True, count_include_pad=False)
        return pooled.flatten(2).transpose(1, 2)

    def beside(self, tokens: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """The kept tokens [B,k,D] followed by these, and the places of all."""
        return torch.cat([tokens, self.tokens.to(tokens.dtype)], dim=1), torch.cat([kept, self.places], dim=1)

    def spread(self, x: Tensor, processed: Tensor) -> Tensor:
        """All tokens [B,N,D], each with what the block added to its square's token [B,M,D]."""
        return x + (processed - self.tokens).index_select(1, self.square)
