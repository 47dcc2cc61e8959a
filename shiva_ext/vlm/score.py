"""How much the prompt's last token wants each visual token."""

import torch
from torch import Tensor, nn


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B,heads,n,d] at the positions of cos and sin [B,n,d]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(1)


@torch.no_grad()
def attention_of_last(
    layer: nn.Module, hidden: Tensor, candidates: Tensor, keys: Tensor, rope: tuple[Tensor, Tensor] | None
) -> Tensor:
    """The last token's attention in a layer to some tokens, mean over the heads.

    Args:
        layer: of Llama's or Qwen2's form: ``input_layernorm``, ``self_attn.q_proj`` and ``k_proj``.
        hidden: its input [B,S,D]; the last token is the one that asks.
        candidates: int64 [B,n], whose attention is wanted.
        keys: bool [B,S], the tokens that the softmax runs over.
        rope: cos and sin [B,S,d] of the positions, or None for a score that does not know them.

    Returns:
        float32 [B,n].
    """
    attention = layer.self_attn
    normed, width = layer.input_layernorm(hidden), attention.head_dim
    query = attention.q_proj(normed[:, -1:]).unflatten(-1, (-1, width)).transpose(1, 2)
    key = attention.k_proj(normed).unflatten(-1, (-1, width)).transpose(1, 2)
    if rope is not None:
        cos, sin = (each.expand(len(hidden), -1, -1) for each in rope)
        query, key = _rotate(query, cos[:, -1:], sin[:, -1:]), _rotate(key, cos, sin)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = (query @ key.mT).float().squeeze(2) * width**-0.5
    weights = logits.masked_fill(~keys.unsqueeze(1), float("-inf")).softmax(dim=-1).mean(dim=1)
    return weights.gather(1, candidates)
