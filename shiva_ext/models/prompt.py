"""A pooled prompt for families that have none."""

import torch
from torch import Tensor


def mean_token(prompt: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens of prompt [B,T,J] -> [B,J].

    Args:
        mask: [B,T], true where a token counts, or the bias [B,1,T] that attention adds; None counts all.
    """
    if mask is None:
        return prompt.mean(dim=1)
    counts = (mask if mask.ndim == 2 else mask.squeeze(1) >= 0).float()
    total = torch.einsum("btj,bt->bj", prompt.float(), counts)  # a sum may be too large for float16
    return (total / counts.sum(dim=1, keepdim=True).clamp(min=1)).to(prompt.dtype)
