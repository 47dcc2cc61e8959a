"""Patches that go because they are like others."""

import torch
from torch import Tensor
from torch.nn import functional as F

from shiva_ext import ops


def drop_similar(x: Tensor, count: int, order: Tensor) -> Tensor:
    """The patches that stay when those go that are most like another one (TNT's ``randsim``).

    Half of the patches, A, is compared with the other half, B, by the cosine; the ``count`` patches of A with the most
    similar one in B go. They are dropped, not merged.

    Args:
        x: [B,n,D].
        count: r, at most ``n // 2``.
        order: int64 [n], a permutation: A is its first half, for the whole batch.

    Returns:
        int64 [B,n-r], ascending.

    Raises:
        ValueError: more are to go than A has.
    """
    n = x.shape[1]
    if not 0 <= count <= n // 2:
        raise ValueError(f"drop_similar: count is {count}, wanted 0 to {n // 2}, half of {n} patches")
    first, second = order[: n // 2], order[n // 2 :]
    with torch.autocast(x.device.type, enabled=False):
        unit = F.normalize(x.float(), dim=-1)
        nearest = (unit[:, first] @ unit[:, second].transpose(1, 2)).amax(dim=2)  # [B, n // 2]
    stays = ops.topk_select(-nearest, n // 2 - count)[0]
    kept = torch.cat([first[stays], second.expand(len(x), -1)], dim=1)
    return kept.sort(dim=1).values
