"""A tiny SD3 model with random weights, what it is called with, and how to see that nothing was left on it."""

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)
from torch import nn

from shiva_ext import ShivaArtifact
from shiva_ext.selection import RatioTable, ShivaRouter

LAYERS, WIDTH, CHANNELS, SIZE, TEXT = 4, 64, 4, 8, 3
N = (SIZE // 2) ** 2  # image tokens
PROMPT_DIM, POOLED_DIM = 16, 24


def make_model(seed: int = 0, **overrides) -> SD3Transformer2DModel:
    """4 layers, one head of 64 channels, 16 image tokens; every weight is random, so that each block does something."""
    config = dict(
        sample_size=SIZE,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=LAYERS,
        num_attention_heads=1,
        attention_head_dim=WIDTH,
        joint_attention_dim=PROMPT_DIM,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=POOLED_DIM,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    model = SD3Transformer2DModel(**{**config, **overrides})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
            if parameter.ndim == 1 and parameter.shape[0] == WIDTH:
                parameter.add_(0.5)
    return model.eval()


def make_inputs(batch: int = 2, size: int = SIZE, sigma: float = 0.7, seed: int = 1, dtype=torch.float32) -> dict:
    """Arguments of one call of the transformer."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    return dict(
        hidden_states=random(batch, CHANNELS, size, size),
        encoder_hidden_states=random(batch, TEXT, PROMPT_DIM),
        pooled_projections=random(batch, POOLED_DIM),
        timestep=torch.full((batch,), 1000 * sigma),
        return_dict=False,
    )


def make_artifact(table: RatioTable | float = 0.6, num_layers: int = LAYERS, seed: int = 2, **options) -> ShivaArtifact:
    """A router with random weights and a given table, or one fixed ratio."""
    torch.manual_seed(seed)
    router = ShivaRouter(WIDTH, WIDTH, WIDTH, num_layers, hidden=16).eval().requires_grad_(False)
    if not isinstance(table, RatioTable):
        table = RatioTable.fixed(table, num_layers)
    return ShivaArtifact("SD3Transformer2DModel", router, table, **options)


@torch.no_grad()
def run_by_hand(model, kept: dict, inputs: dict) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What a dense SD3 model gives if each block sees the image tokens kept[layer] [B,k] alone, written with indexing.

    Returns:
        the output, and the image tokens [B,N,D] at the entry of each block and after the last one.
    """
    latents, residuals = inputs["hidden_states"], inputs.get("block_controlnet_hidden_states")
    batch, blocks = torch.arange(len(latents))[:, None], model.transformer_blocks
    x, text = model.pos_embed(latents), model.context_embedder(inputs["encoder_hidden_states"])
    temb = model.time_text_embed(inputs["timestep"], inputs["pooled_projections"])
    tokens = [x]
    for layer, block in enumerate(blocks):
        if layer not in (inputs.get("skip_layers") or ()):
            index = kept.get(layer, torch.arange(x.shape[1]).expand(len(x), -1))
            text, processed = block(x[batch, index], text, temb)
            x = x.clone()
            x[batch, index] = processed
        if residuals is not None and layer < len(blocks) - 1:
            x = x + residuals[int(layer / (len(blocks) / len(residuals)))]
        tokens.append(x)
    p, (B, _, H, W) = model.config.patch_size, latents.shape
    patches = model.proj_out(model.norm_out(x, temb)).reshape(B, H // p, W // p, p, p, model.out_channels)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(B, model.out_channels, H, W), tokens


def varying_table(rows: int = 4, num_layers: int = LAYERS) -> RatioTable:
    """A table with another count of 16 tokens in every cell of its first rows."""
    sigmas = [(row + 0.5) / rows for row in range(rows)]
    counts = torch.tensor([[5 + (row + 3 * layer) % 11 for layer in range(num_layers)] for row in range(rows)])
    ratios = counts / N
    ratios[:, 0] = 1
    return RatioTable(sigmas, ratios)


def make_pipeline(transformer, kind=StableDiffusion3Pipeline, scheduler=None, vae=None):
    """Diffusers' own pipeline without text encoders: call it with embeddings and ``output_type="latent"``."""
    encoders = dict.fromkeys(
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    )
    scheduler = FlowMatchEulerDiscreteScheduler() if scheduler is None else scheduler
    pipe = kind(transformer=transformer, scheduler=scheduler, vae=vae, **encoders)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_img2img(transformer, scheduler=None):
    """The image-to-image pipeline around a random autoencoder without downsampling."""
    torch.manual_seed(5)
    vae = AutoencoderKL(
        block_out_channels=(8,), latent_channels=CHANNELS, norm_num_groups=4, layers_per_block=1, shift_factor=0.0
    )
    return make_pipeline(transformer, StableDiffusion3Img2ImgPipeline, scheduler, vae.eval())


def pipeline_inputs(prompts: int = 1, steps: int = 3, guidance: float = 4.0, size: int = SIZE, seed: int = 3) -> dict:
    """Arguments of one call of the pipeline; the output's first element is the latents."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, prompts, TEXT, PROMPT_DIM, generator=generator)
    pooled = torch.randn(2, prompts, POOLED_DIM, generator=generator)
    guided = dict(negative_prompt_embeds=tokens[1], negative_pooled_prompt_embeds=pooled[1]) if guidance > 1 else {}
    return dict(
        prompt_embeds=tokens[0],
        pooled_prompt_embeds=pooled[0],
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=size * 8,
        width=size * 8,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        return_dict=False,
        **guided,
    )


def snapshot(model: nn.Module) -> dict:
    """Every attribute of every module by identity, and every weight by its bits."""
    attributes = {}
    for name, module in model.named_modules():
        own = {key: id(value) for key, value in vars(module).items() if not key.startswith("_") or "hook" in key}
        attributes[name] = (type(module), sorted(vars(module)), own)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = {key: (id(p), p.data_ptr(), p.requires_grad) for key, p in model.named_parameters()}
    return dict(attributes=attributes, weights=weights, parameters=parameters)


def assert_unchanged(model: nn.Module, before: dict) -> None:
    after = snapshot(model)
    assert after["attributes"] == before["attributes"]
    assert after["parameters"] == before["parameters"]
    assert list(after["weights"]) == list(before["weights"])
    for key, value in before["weights"].items():
        assert torch.equal(after["weights"][key], value), key
