"""A whole Stable Diffusion 3 pipeline on a tiny scale, with text encoders and an autoencoder, and images for it."""

import json
import string
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

import shiva_ext
from shiva_ext.models import adapter_for
from shiva_ext.selection import RatioTable, ShivaRouter

SIDE = 16


def tokenizer(folder: Path) -> CLIPTokenizer:
    """Letters as tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [*string.ascii_lowercase, *(c + "</w>" for c in string.ascii_lowercase)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)


def text_encoder() -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=54, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, projection_dim=8, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config).eval()


def save_pipeline(folder: Path) -> Path:
    """Write the pipeline as diffusers does."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=SIDE, patch_size=2, in_channels=4, out_channels=4, num_layers=3, num_attention_heads=1,
        attention_head_dim=32, joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=16,
        pos_embed_max_size=16,
    )  # fmt: skip
    for p in transformer.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    vae = AutoencoderKL(
        block_out_channels=(8,), latent_channels=4, norm_num_groups=4, layers_per_block=1, shift_factor=0.1,
        scaling_factor=1.5,
    )  # fmt: skip
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae.eval(),
        text_encoder=text_encoder(), tokenizer=tokenizer(folder / "t1"), text_encoder_2=text_encoder(),
        tokenizer_2=tokenizer(folder / "t2"), text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipe.save_pretrained(folder / "model")
    return folder / "model"


def save_images(folder: Path, count: int = 6) -> Path:
    """Coloured noise with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        pixels = torch.randint(0, 255, (20, 24, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {string.ascii_lowercase[i]}")
    return folder


def save_artifact(folder: Path) -> Path:
    """A selection with a random router for the pipeline that :func:`save_pipeline` has put into a folder."""
    transformer = SD3Transformer2DModel.from_pretrained(folder / "model" / "transformer")
    torch.manual_seed(2)
    dims = adapter_for(transformer).dims(transformer)
    router = ShivaRouter(**dims, hidden=16).eval().requires_grad_(False)
    table = RatioTable.fixed(0.6, dims["num_layers"])
    shiva_ext.ShivaArtifact("SD3Transformer2DModel", router, table).save(folder / "artefact")
    return folder / "artefact"
