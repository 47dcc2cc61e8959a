"""Floating-point operations of a transformer's forward pass, counted from its settings."""

import math
from collections.abc import Callable, Collection, Mapping
from functools import wraps
from typing import NamedTuple

from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from torch import nn


def attention_flops(dim: int, image_tokens: int, text_tokens: int = 0, text_output: bool = True) -> int:
    """Projections and scores of one (joint) attention over image and text tokens together.

    Args:
        dim: heads times head dimension.
        image_tokens, text_tokens: rows of each stream; without text it is plain self-attention.
        text_output: whether the text stream gets an output projection (SD3's last block has none).
    """
    total = image_tokens + text_tokens
    projections = 4 * image_tokens + (3 + text_output) * text_tokens
    return 2 * projections * dim * dim + 4 * total * total * dim


def router_flops(dim: int, width: int, tokens: int) -> int:
    """Operations of scoring ``tokens`` tokens of ``dim`` channels once: Shiva-DiT (arXiv 2602.05605), eq. 9."""
    return 2 * width * tokens * (dim + 1)


def cross_attention_flops(dim: int, inner: int, context: int, image_tokens: int, text_tokens: int) -> int:
    """Projections and scores of image tokens [.., dim] that attend to text [.., context] in ``inner`` channels."""
    projections = 2 * image_tokens * dim * inner + 2 * text_tokens * context * inner
    return 2 * projections + 4 * image_tokens * text_tokens * inner


def _checked(name: str, kept: Mapping | None, layers: int, N: int) -> dict[int, int | tuple[int, int]]:
    kept = dict(kept or {})
    for layer, k in kept.items():
        if not (0 <= layer < layers and all(0 <= each <= N for each in (k if isinstance(k, tuple) else (k,)))):
            raise ValueError(f"{name}: kept must map layers 0..{layers - 1} to 0..{N} tokens, got layer {layer}: {k}")
    return kept


class Work(NamedTuple):
    """What a forward pass of one sample consists of.

    Attributes:
        dim: channels of an image token.
        layers: prunable blocks.
        tokens: image tokens N.
        outside: operations outside the blocks.
        block: operations of a block on k of the image tokens, ``block(layer, k)``.
        mlp: operations of a block's MLP on one image token, where attention and MLP can process different ones.
    """

    dim: int
    layers: int
    tokens: int
    outside: int
    block: Callable[[int, int], int]
    mlp: int = 0

    def of_block(self, layer: int, k: int | tuple[int, int]) -> int:
        """Operations of a block on k tokens, or on (k of the attention, k of the MLP)."""
        if isinstance(k, int):
            return self.block(layer, k)
        attention, mlp = k
        if attention != mlp and not self.mlp:
            raise ValueError("forward_flops: in this family attention and MLP process the same tokens")
        return self.block(layer, attention) + self.mlp * (mlp - attention)


def _counted(work: Callable[[nn.Module, int, int | None], Work]):
    """Makes a counter with the arguments of :func:`sd3_forward_flops` of a family's :class:`Work`."""

    @wraps(work, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
    def forward_flops(
        transformer: nn.Module,
        text_tokens: int = 0,
        image_tokens: int | None = None,
        kept: Mapping[int, int | tuple[int, int]] | None = None,
        router_width: int = 0,
        scored: Collection[int] | None = None,
    ) -> int:
        found = work(transformer, text_tokens, image_tokens)
        N = found.tokens
        kept = _checked(work.__name__, kept, found.layers, N)
        blocks = sum(found.of_block(layer, kept.get(layer, N)) for layer in range(found.layers))
        scores = len(kept if scored is None else scored) * router_flops(found.dim, router_width, N)
        return found.outside + blocks + scores

    return forward_flops


def _square(config, image_tokens: int | None) -> int:
    """Image tokens, by default those of the configured ``sample_size``."""
    return (config.sample_size // config.patch_size) ** 2 if image_tokens is None else image_tokens


def _ends(config, N: int, D: int, patch: int) -> int:
    """Operations of the patch embedding and of the projection to the output's channels."""
    out_channels = config.in_channels if config.out_channels is None else config.out_channels
    return 2 * N * patch * D * (config.in_channels + out_channels)


@_counted
def sd3_forward_flops(transformer: SD3Transformer2DModel, T: int, image_tokens: int | None) -> Work:
    """Floating-point operations of one forward pass of one sample (no guidance: that makes two samples of it).

    A multiply-add counts as two. Matrix products, attention and the patch convolution are counted; norms, activations,
    residuals and the selection, gather and scatter of tokens are not, as in ``torch.utils.flop_counter``. Adapters
    count as merged. A pruned block (Shiva-DiT, arXiv 2602.05605) runs on its kept image tokens and all text tokens.

    Args:
        transformer: any configuration; only ``transformer.config`` is read.
        text_tokens: length of ``encoder_hidden_states``.
        image_tokens: tokens after patching; by default those of the configured ``sample_size``.
        kept: kept image tokens of each pruned layer, e.g. ``{1: 154, 2: 154}``; layers not named are dense. A pair is
            the tokens of the attention and those of the MLP.
        router_width: hidden width of the router that scores all tokens at the entry of each pruned layer (eq. 9);
            0 for methods without a learned router.
        scored: the layers whose tokens it scores; by default all pruned ones. Fewer where layers share a selection.

    Raises:
        ValueError: a layer that does not exist, or more kept tokens than there are.
    """
    config = transformer.config
    D, layers = config.num_attention_heads * config.attention_head_dim, config.num_layers
    N = _square(config, image_tokens)

    def block(layer: int, k: int) -> int:
        last, dual = layer == layers - 1, layer in config.dual_attention_layers
        total = 2 * D * D * ((9 if dual else 6) + (2 if last else 6))  # modulation of image and text stream
        total += attention_flops(D, k, T, text_output=not last) + (attention_flops(D, k) if dual else 0)
        return total + 16 * D * D * (k + (0 if last else T))  # MLPs, four times as wide inside

    outside = _ends(config, N, D, config.patch_size**2) + 2 * D * 2 * D  # with the modulation of the output norm
    outside += 2 * D * (256 + D) + 2 * D * (config.pooled_projection_dim + D)  # timestep and pooled prompt embedding
    outside += 2 * T * config.joint_attention_dim * config.caption_projection_dim
    return Work(D, layers, N, outside, block, mlp=16 * D * D)


@_counted
def pixart_forward_flops(transformer: PixArtTransformer2DModel, T: int, image_tokens: int | None) -> Work:
    """The same as :func:`sd3_forward_flops` for PixArt: cross-attention to the prompt, whose tokens do not change."""
    config = transformer.config
    D, N = config.num_attention_heads * config.attention_head_dim, _square(config, image_tokens)

    def block(_: int, k: int) -> int:
        cross = cross_attention_flops(D, D, config.cross_attention_dim, k, T)
        return attention_flops(D, k) + cross + 16 * D * D * k

    outside = _ends(config, N, D, config.patch_size**2)
    outside += 2 * D * (256 + D) + 2 * D * 6 * D  # timestep embedding, modulation of all blocks
    if transformer.use_additional_conditions:  # height, width and aspect ratio
        outside += 3 * 2 * (D // 3) * (256 + D // 3)
    if config.caption_channels is not None:
        outside += 2 * T * D * (config.caption_channels + D)
    return Work(D, config.num_layers, N, outside, block, mlp=16 * D * D)


@_counted
def flux_forward_flops(transformer: FluxTransformer2DModel, T: int, image_tokens: int | None) -> Work:
    """The same as :func:`sd3_forward_flops` for Flux, whose layers are the joint blocks and then the single ones.

    ``image_tokens`` are 4,096 unless given: 1024 x 1024 pixels.
    """
    config = transformer.config
    D, joint = config.num_attention_heads * config.attention_head_dim, config.num_layers
    N = 64 * 64 if image_tokens is None else image_tokens

    def block(layer: int, k: int) -> int:
        if layer < joint:
            return attention_flops(D, k, T) + 16 * D * D * (k + T) + 2 * D * D * 12
        # Attention without an output projection, beside the MLP; one projection for both.
        return 2 * 12 * D * D * (k + T) + 4 * (k + T) ** 2 * D + 2 * D * D * 3

    embeddings = 2 if config.guidance_embeds else 1
    out_channels = config.in_channels if config.out_channels is None else config.out_channels
    outside = 2 * N * D * (config.in_channels + config.patch_size**2 * out_channels)  # latents come in as patches
    outside += 2 * T * config.joint_attention_dim * D
    outside += 2 * D * (embeddings * (256 + D) + config.pooled_projection_dim + D) + 2 * D * 2 * D
    return Work(D, joint + config.num_single_layers, N, outside, block)


@_counted
def dit_forward_flops(transformer: DiTTransformer2DModel, T: int, image_tokens: int | None) -> Work:
    """The same as :func:`sd3_forward_flops` for DiT, which has no text; each block embeds the timestep anew."""
    config = transformer.config
    D, N = config.num_attention_heads * config.attention_head_dim, _square(config, image_tokens)
    embedding = 2 * D * (256 + D)

    def block(_: int, k: int) -> int:
        return embedding + 2 * D * 6 * D + attention_flops(D, k) + 16 * D * D * k

    outside = _ends(config, N, D, config.patch_size**2) + embedding + 2 * D * 2 * D
    return Work(D, config.num_layers, N, outside, block, mlp=16 * D * D)


@_counted
def sana_forward_flops(transformer: SanaTransformer2DModel, T: int, image_tokens: int | None) -> Work:
    """The same as :func:`sd3_forward_flops` for Sana: linear attention, and a convolution over the whole image."""
    config = transformer.config
    heads, d = config.num_attention_heads, config.attention_head_dim
    D, N, inside = heads * d, _square(config, image_tokens), int(config.mlp_ratio * heads * d)
    inner = config.num_cross_attention_heads * config.cross_attention_head_dim

    def block(_: int, k: int) -> int:
        total = 8 * k * D * D + 2 * 2 * k * heads * (d + 1) * d
        total += cross_attention_flops(D, inner, config.cross_attention_dim, k, T)
        return total + 2 * k * D * 3 * inside + 2 * 9 * N * 2 * inside  # pointwise, depthwise

    embeddings = 2 if config.guidance_embeds else 1
    outside = _ends(config, N, D, config.patch_size**2) + embeddings * 2 * D * (256 + D) + 2 * D * 6 * D
    return Work(D, config.num_layers, N, outside + 2 * T * D * (config.caption_channels + D), block)


@_counted
def qwenimage_forward_flops(transformer: QwenImageTransformer2DModel, T: int, image_tokens: int | None) -> Work:
    """The same as :func:`sd3_forward_flops` for Qwen-Image; ``image_tokens`` are 4,096 unless given."""
    config = transformer.config
    D = config.num_attention_heads * config.attention_head_dim
    N = 64 * 64 if image_tokens is None else image_tokens
    steps = 2 if config.zero_cond_t else 1  # timesteps of a sample

    def block(_: int, k: int) -> int:
        return 2 * D * 6 * D * (steps + 1) + attention_flops(D, k, T) + 16 * D * D * (k + T)

    out_channels = config.in_channels if config.out_channels is None else config.out_channels
    outside = 2 * N * D * (config.in_channels + config.patch_size**2 * out_channels)  # latents come in as patches
    outside += 2 * T * config.joint_attention_dim * D + steps * 2 * D * (256 + D) + 2 * D * 2 * D
    return Work(D, config.num_layers, N, outside, block)


@_counted
def wan_forward_flops(transformer: WanTransformer3DModel, T: int, image_tokens: int | None) -> Work:
    """The same as :func:`sd3_forward_flops` for Wan from text, one timestep a sample.

    ``image_tokens`` are 32,760 unless given: 81 frames of 832 x 480 pixels.
    """
    config = transformer.config
    D = config.num_attention_heads * config.attention_head_dim
    N = 21 * 30 * 52 if image_tokens is None else image_tokens

    def block(_: int, k: int) -> int:
        return attention_flops(D, k) + cross_attention_flops(D, D, D, k, T) + 4 * k * D * config.ffn_dim

    outside = _ends(config, N, D, math.prod(config.patch_size))
    outside += 2 * D * (config.freq_dim + D + 6 * D) + 2 * T * D * (config.text_dim + D)
    return Work(D, config.num_layers, N, outside, block)
