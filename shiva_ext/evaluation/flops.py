"""Floating-point operations of a transformer's forward pass, counted from its settings."""

from collections.abc import Collection, Mapping

from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel


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


def _checked(name: str, kept: Mapping[int, int] | None, layers: int, N: int) -> dict[int, int]:
    kept = dict(kept or {})
    for layer, k in kept.items():
        if not (0 <= layer < layers and 0 <= k <= N):
            raise ValueError(f"{name}: kept must map layers 0..{layers - 1} to 0..{N} tokens, got layer {layer}: {k}")
    return kept


def sd3_forward_flops(
    transformer: SD3Transformer2DModel,
    text_tokens: int,
    image_tokens: int | None = None,
    kept: Mapping[int, int] | None = None,
    router_width: int = 0,
    scored: Collection[int] | None = None,
) -> int:
    """Floating-point operations of one forward pass of one sample (no guidance: that makes two samples of it).

    A multiply-add counts as two. Matrix products, attention and the patch convolution are counted; norms, activations,
    residuals and the selection, gather and scatter of tokens are not, as in ``torch.utils.flop_counter``. Adapters
    count as merged. A pruned block (Shiva-DiT, arXiv 2602.05605) runs on its kept image tokens and all text tokens.

    Args:
        transformer: any configuration; only ``transformer.config`` is read.
        text_tokens: length of ``encoder_hidden_states``.
        image_tokens: tokens after patching; by default those of the configured ``sample_size``.
        kept: kept image tokens of each pruned layer, e.g. ``{1: 154, 2: 154}``; layers not named are dense.
        router_width: hidden width of the router that scores all tokens at the entry of each pruned layer (eq. 9);
            0 for methods without a learned router.
        scored: the layers whose tokens it scores; by default all pruned ones. Fewer where layers share a selection.

    Raises:
        ValueError: a layer that does not exist, or more kept tokens than there are.
    """
    config = transformer.config
    D, layers = config.num_attention_heads * config.attention_head_dim, config.num_layers
    N = (config.sample_size // config.patch_size) ** 2 if image_tokens is None else image_tokens
    kept = _checked("sd3_forward_flops", kept, layers, N)
    patch = config.patch_size**2
    out_channels = config.in_channels if config.out_channels is None else config.out_channels
    total = 2 * N * patch * config.in_channels * D  # patch embedding
    total += 2 * D * (256 + D) + 2 * D * (config.pooled_projection_dim + D)  # timestep and pooled prompt embedding
    total += 2 * text_tokens * config.joint_attention_dim * config.caption_projection_dim
    for layer in range(layers):
        k, last, dual = kept.get(layer, N), layer == layers - 1, layer in config.dual_attention_layers
        total += 2 * D * D * ((9 if dual else 6) + (2 if last else 6))  # modulation of image and text stream
        total += attention_flops(D, k, text_tokens, text_output=not last)
        total += attention_flops(D, k) if dual else 0
        total += 16 * D * D * (k + (0 if last else text_tokens))  # MLPs, four times as wide inside
    total += len(kept if scored is None else scored) * router_flops(D, router_width, N)
    total += 2 * D * 2 * D  # modulation of the output norm
    total += 2 * N * D * patch * out_channels
    return total


def pixart_forward_flops(
    transformer: PixArtTransformer2DModel,
    text_tokens: int,
    image_tokens: int | None = None,
    kept: Mapping[int, int] | None = None,
    router_width: int = 0,
    scored: Collection[int] | None = None,
) -> int:
    """The same as :func:`sd3_forward_flops` for PixArt: cross-attention to the prompt, whose tokens do not change."""
    config = transformer.config
    D, layers = config.num_attention_heads * config.attention_head_dim, config.num_layers
    N = (config.sample_size // config.patch_size) ** 2 if image_tokens is None else image_tokens
    kept = _checked("pixart_forward_flops", kept, layers, N)
    patch = config.patch_size**2
    total = 2 * N * patch * config.in_channels * D
    total += 2 * D * (256 + D) + 2 * D * 6 * D  # timestep embedding, modulation of all blocks
    if transformer.use_additional_conditions:  # height, width and aspect ratio
        total += 3 * 2 * (D // 3) * (256 + D // 3)
    context = config.cross_attention_dim
    if config.caption_channels is not None:
        total += 2 * text_tokens * D * (config.caption_channels + D)
    for layer in range(layers):
        k = kept.get(layer, N)
        total += attention_flops(D, k)
        total += 4 * k * D * D + 4 * text_tokens * context * D + 4 * k * text_tokens * D  # cross-attention
        total += 16 * D * D * k
    out_channels = config.in_channels if config.out_channels is None else config.out_channels
    total += len(kept if scored is None else scored) * router_flops(D, router_width, N)
    return total + 2 * N * D * patch * out_channels


def flux_forward_flops(
    transformer: FluxTransformer2DModel,
    text_tokens: int,
    image_tokens: int | None = None,
    kept: Mapping[int, int] | None = None,
    router_width: int = 0,
    scored: Collection[int] | None = None,
) -> int:
    """The same as :func:`sd3_forward_flops` for Flux, whose layers are the joint blocks and then the single ones.

    ``image_tokens`` are 4,096 unless given: 1024 x 1024 pixels.
    """
    config = transformer.config
    D, joint = config.num_attention_heads * config.attention_head_dim, config.num_layers
    layers, T = joint + config.num_single_layers, text_tokens
    N = 64 * 64 if image_tokens is None else image_tokens
    kept = _checked("flux_forward_flops", kept, layers, N)
    embeddings = 2 if config.guidance_embeds else 1
    total = 2 * N * config.in_channels * D + 2 * T * config.joint_attention_dim * D
    total += 2 * D * (embeddings * (256 + D) + config.pooled_projection_dim + D)
    for layer in range(layers):
        k = kept.get(layer, N)
        if layer < joint:
            total += attention_flops(D, k, T) + 16 * D * D * (k + T) + 2 * D * D * 12
        else:  # attention without an output projection, beside the MLP; one projection for both
            total += 2 * 12 * D * D * (k + T) + 4 * (k + T) ** 2 * D + 2 * D * D * 3
    out_channels = config.in_channels if config.out_channels is None else config.out_channels
    total += len(kept if scored is None else scored) * router_flops(D, router_width, N)
    return total + 2 * D * 2 * D + 2 * N * D * config.patch_size**2 * out_channels
