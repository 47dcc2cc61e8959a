"""What the tokens that a block did not process get from it."""

import torch
from torch import Tensor

from . import ops
from .methods.memory import RunMemory

IDENTITY, NEAREST, LAST = "identity", "nearest", "last"
CHOICES = (IDENTITY, NEAREST, LAST)
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
