"""A tiny vision-language model with random weights: 81 visual tokens an image, six layers."""

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
)

IMAGE, VOCAB, N, LAYERS = 90, 96, 81, 6
TEXT = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=VOCAB, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
FAMILIES = {
    "llama": lambda: LlamaConfig(**TEXT),
    "qwen2": lambda: Qwen2Config(**TEXT),
    "mistral": lambda: MistralConfig(**TEXT, sliding_window=None),
}


def make_vlm(family: str = "llama", seed: int = 0, attention: str = "sdpa") -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=36, patch_size=4
    )
    config = LlavaConfig(
        vision_config=vision, text_config=FAMILIES[family](), image_token_index=IMAGE, image_seq_length=N
    )
    config._attn_implementation = attention
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape) * p.shape[-1] ** -0.5)
    return model


def make_prompt(batch: int = 2, seed: int = 1, padding: int = 0, images: int = 1) -> dict:
    """``[padding] BOS [image] some words``; the first sample is padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 80, (batch, 7), generator=generator)
    start = torch.ones(batch, 1, dtype=torch.long)
    image = torch.full((batch, N), IMAGE)
    parts = [start]
    for i in range(images):
        parts += [image, words[:, i : i + 1]]
    ids = torch.cat([*parts, words[:, images:]], dim=1)
    mask = torch.ones_like(ids)
    if padding:
        ids = torch.nn.functional.pad(ids, (padding, 0))
        mask = torch.nn.functional.pad(mask, (padding, 0))
        extra = torch.randint(3, 80, (batch - 1, padding), generator=generator)
        ids[1:, :padding], mask[1:, :padding] = extra, 1
    pixels = torch.randn(batch * images, 3, 36, 36, generator=generator)
    return dict(input_ids=ids, attention_mask=mask, pixel_values=pixels)
