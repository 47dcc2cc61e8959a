"""Attention and MLP of diffusers' blocks on some of their heads, channels and tokens."""

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, JointAttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional as F


def check_parts(method: str, adapter, transformer: nn.Module) -> None:
    """Refuse a family whose blocks are not made of what the functions here restate.

    Raises:
        TypeError: its blocks have no attention and MLP apart, or of another kind.
    """
    for block in adapter.blocks(transformer):
        sites = adapter.merge_sites(block)
        fits = all(type(each) is Attention for each in sites.get("attention", ())) and all(
            type(each) is FeedForward and type(each.net[0]) is GELU for each in sites.get("mlp", ())
        )
        if fits and getattr(block, "_chunk_size", None) is not None:
            raise ValueError(f"shiva_ext: {method} runs the MLP itself; turn forward chunking off")
        if not (sites.get("attention") and sites.get("mlp") and sites.get("mlp_norm")) or not fits:
            raise TypeError(
                f"shiva_ext: {method} reaches into attention and MLP, and knows those of SD3, DiT and PixArt; "
                f"{type(block).__name__} of {type(transformer).__name__} is made of others"
            )


def check_processor(attn: Attention) -> None:
    """Refuse an attention that does something else than what :func:`attention` restates.

    Raises:
        TypeError: a processor of another kind was set.
    """
    if type(attn.processor) not in (AttnProcessor2_0, JointAttnProcessor2_0):
        raise TypeError(
            f"shiva_ext: an attention has the processor {type(attn.processor).__name__}, which the method would pass "
            "by; wanted diffusers' own, AttnProcessor2_0 or JointAttnProcessor2_0"
        )


def _plain(layer: nn.Module, x: Tensor) -> bool:
    """Whether a part of a layer's weight can be multiplied by itself.

    Not with a LoRA or a quantised weight, nor where a hook brings the weight or casts it as the layer is called.
    """
    weight = getattr(layer, "weight", None)
    hooked = hasattr(layer, "_hf_hook") or hasattr(layer, "_diffusers_hook")
    known = type(layer) is nn.Linear and type(weight) in (nn.Parameter, Tensor) and not hooked
    return known and weight.dtype == x.dtype and weight.device == x.device


def _linear(layer: nn.Module, x: Tensor, rows: Tensor | None = None) -> Tensor:
    """A linear layer, or only these of its outputs."""
    if rows is None:
        return layer(x)
    if not _plain(layer, x):
        return layer(x)[..., rows]
    return F.linear(x, layer.weight[rows], None if layer.bias is None else layer.bias[rows])


def _onto(layer: nn.Module, x: Tensor, columns: Tensor | None = None) -> Tensor:
    """A linear layer whose input is x, or these channels of its input."""
    if columns is None:
        return layer(x)
    if not _plain(layer, x):
        return layer(x.new_zeros(*x.shape[:-1], layer.in_features).index_copy(-1, columns, x))
    return F.linear(x, layer.weight[:, columns], layer.bias)


def channels_of(groups: Tensor | None, size: int) -> Tensor | None:
    """The channels of groups of ``size`` channels each, int64 [groups * size]."""
    if groups is None:
        return None
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()


def attention(
    attn: Attention,
    x: Tensor,
    text: Tensor | None = None,
    *,
    keys: Tensor | None = None,
    mask: Tensor | None = None,
    heads: Tensor | None = None,
):
    """What a diffusers attention (joint with text, or of image tokens alone) computes, in a wider form.

    Args:
        attn: of SD3's, DiT's or PixArt's blocks.
        x: [B,M,D], image tokens that ask.
        text: [B,T,D], text tokens that ask and are asked, in joint attention.
        keys: [B,N,D], image tokens that are asked; by default x.
        mask: [B,H], factor of each head's output.
        heads: int64 [h]: the heads to compute; the others give nothing, and none of their weights are read.

    Returns:
        as the attention itself: [B,M,D], and with text a pair of it and the text's output.
    """
    check_processor(attn)
    keys = x if keys is None else keys
    size = attn.to_q.out_features // attn.heads
    rows = channels_of(heads, size)

    def split(layer: nn.Module, tokens: Tensor, norm: nn.Module | None = None) -> Tensor:
        found = _linear(layer, tokens, rows).unflatten(-1, (-1, size)).transpose(1, 2)
        return found if norm is None else norm(found)

    q, k, v = split(attn.to_q, x, attn.norm_q), split(attn.to_k, keys, attn.norm_k), split(attn.to_v, keys)
    if text is not None:
        q = torch.cat([q, split(attn.add_q_proj, text, attn.norm_added_q)], dim=2)
        k = torch.cat([k, split(attn.add_k_proj, text, attn.norm_added_k)], dim=2)
        v = torch.cat([v, split(attn.add_v_proj, text)], dim=2)
    y = F.scaled_dot_product_attention(q, k, v)
    if mask is not None:
        y = y * mask[:, :, None, None].to(y.dtype)
    y = y.transpose(1, 2).flatten(2)
    image = attn.to_out[1](_onto(attn.to_out[0], y[:, : x.shape[1]], rows))
    if text is None:
        return image
    rest = y[:, x.shape[1] :]
    return image, rest if attn.context_pre_only else _onto(attn.to_add_out, rest, rows)


def mean_attention(attn: Attention, x: Tensor, text: Tensor | None = None):
    """Attention without queries and keys: every token gets the mean of all values. Else as :func:`attention`."""
    check_processor(attn)
    values = [attn.to_v(x)] if text is None else [attn.to_v(x), attn.add_v_proj(text)]
    # In half precision a sum over thousands of tokens can overflow.
    mean = torch.cat(values, dim=1).mean(dim=1, keepdim=True, dtype=torch.float32).to(values[0].dtype)
    image = attn.to_out[0](mean).expand(-1, x.shape[1], -1)
    if text is None:
        return image
    rest = mean if attn.context_pre_only else attn.to_add_out(mean)
    return image, rest.expand(-1, text.shape[1], -1)


def feed_forward(ff: FeedForward, x: Tensor, *, mask: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
    """A diffusers MLP on some of its hidden channels.

    Args:
        ff: with a GELU.
        x: [...,D].
        mask: broadcastable to the hidden channels [...,hidden], multiplies them before the GELU.
        columns: int64 [h], the hidden channels to compute.
    """
    hidden = _linear(ff.net[0].proj, x, columns)
    if mask is not None:
        hidden = hidden * mask.to(hidden.dtype)
    return _onto(ff.net[2], F.gelu(hidden, approximate=ff.net[0].approximate), columns)
