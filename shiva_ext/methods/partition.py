"""Groups of tokens that are processed as one, and how they are found."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..selection.baselines import hash_keys, hash_rows

MEAN, KEEP, MLERP = "mean", "keep", "mlerp"


@dataclass(frozen=True)
class Partition:
    """N tokens in M groups, each with a leader whose place the group's one token takes.

    Attributes:
        leaders: int64 [B,M], ascending.
        merged: int64 [B,N-M], the other tokens, ascending.
        position: int64 [B,N], the group of each token.
        how: the group's token is the "mean" of its tokens, the leader alone ("keep"), or "mlerp": the mean's direction
            with the largest norm of the group.
    """

    leaders: Tensor
    merged: Tensor
    position: Tensor
    how: str = MEAN

    def merge(self, x: Tensor) -> Tensor:
        if self.how == KEEP:
            return ops.token_gather(x, self.leaders)
        mean = ops.scatter_mean(x, self.position, self.leaders.shape[1])
        if self.how == MEAN:
            return mean
        wide = torch.promote_types(x.dtype, torch.float32)
        norms = torch.linalg.vector_norm(x, dim=-1, dtype=wide)
        largest = torch.zeros_like(self.leaders, dtype=wide).scatter_reduce(1, self.position, norms, "amax")
        return (F.normalize(mean.to(wide), dim=-1) * largest.unsqueeze(-1)).to(x.dtype)

    def unmerge(self, y: Tensor) -> Tensor:
        # A plain gather: a leader's row comes as often as its group has tokens.
        first = torch.arange(len(y), device=y.device)[:, None] * y.shape[1]
        rows = (self.position + first).flatten()
        return y.flatten(0, 1).index_select(0, rows).unflatten(0, self.position.shape)


def partition(score: Tensor, nearest: Tensor, r: int, how: str = MEAN) -> Partition:
    """Merge the r tokens of the highest score each into a token of its own choice.

    Args:
        score: [B,N], -inf for tokens that must stay.
        nearest: int64 [B,N], the token that each would join: one that stays.
        r: how many; at most the number of tokens that may go.
        how: see :class:`Partition`.
    """
    merged, leaders = ops.topk_select(score, r)
    B, N = score.shape
    position = torch.zeros(B, N, dtype=torch.int64, device=score.device)
    position.scatter_(1, leaders, torch.arange(N - r, device=score.device).expand(B, -1))
    joined = position.gather(1, nearest.gather(1, merged))
    return Partition(leaders, merged, position.scatter(1, merged, joined), how)


def best_destination(metric: Tensor, destinations: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's most similar destination.

    Args:
        metric: [B,N,C]; the similarity is the cosine of two rows.
        destinations: int64 [B,K].

    Returns:
        (score, nearest): float32 [B,N], the similarity, and -inf for the destinations themselves; int64 [B,N], which.
    """
    # In half precision most similarities are equal, and the first tokens would be merged whatever they are.
    unit = F.normalize(metric.float(), dim=-1)
    score, index = torch.matmul(unit, ops.token_gather(unit, destinations).transpose(1, 2)).max(dim=-1)
    nearest = destinations.gather(1, index)
    return score.scatter(1, destinations, -torch.inf), nearest


def window_destinations(grid: tuple[int, int], window: int, batch: int, key: tuple | None, device) -> Tensor:
    """One token of each window x window square of the grid, the same for all samples: int64 [batch, windows].

    Args:
        grid: height and width in tokens; rows and columns that fill no window have none.
        window: side of a window.
        batch: samples.
        key: integers and numbers that a pseudo-random choice depends on; None takes the top left.
        device: of the result.
    """
    height, width = grid
    row = torch.arange(height // window, device=device)[:, None] * window
    column = torch.arange(width // window, device=device)[None] * window
    if key is not None:
        drawn = hash_rows(row.numel() * column.numel(), [hash_keys(*key)], device)[0] % (window * window)
        drawn = drawn.view(len(row), -1)
        row, column = row + drawn // window, column + drawn % window
    return (row * width + column).flatten().expand(batch, -1).contiguous()


def window_of_tokens(grid: tuple[int, int], window: int, device) -> Tensor:
    """The tokens of each full window, int64 [windows, window * window]."""
    height, width = (side // window * window for side in grid)
    index = torch.arange(grid[0] * grid[1], device=device).view(grid)[:height, :width]
    index = index.view(height // window, window, width // window, window).transpose(1, 2)
    return index.reshape(-1, window * window)
