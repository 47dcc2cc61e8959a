"""Whole pipelines of further families on a tiny scale, saved as diffusers does."""

import string
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from training.tiny_pipeline import text_encoder, tokenizer
from transformers import CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

SIDE = 16


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8,), latent_channels=4, norm_num_groups=4, layers_per_block=1, shift_factor=0.1,
        scaling_factor=1.5,
    ).eval()  # fmt: skip


def _t5() -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    """An encoder of 24 channels, and letters as tokens."""
    tokens = Tokenizer(models.WordLevel({c: i + 2 for i, c in enumerate(string.ascii_lowercase)} | {"?": 1}, "?"))
    tokens.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    config = T5Config(vocab_size=32, d_model=24, d_kv=12, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval(), PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", unk_token="?"
    )


def _filled(transformer):
    for p in transformer.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return transformer


def save_flux(folder: Path) -> Path:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    encoder, words = _t5()
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=_vae(), text_encoder=CLIPTextModel(text_encoder().config),
        tokenizer=tokenizer(folder / "t1"), text_encoder_2=encoder, tokenizer_2=words,
        transformer=_filled(transformer),
    )  # fmt: skip
    pipe.save_pretrained(folder / "model")
    return folder / "model"


def save_pixart(folder: Path) -> Path:
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=3,
        cross_attention_dim=32, caption_channels=24, sample_size=SIDE, use_additional_conditions=False,
    )  # fmt: skip
    encoder, words = _t5()
    pipe = PixArtSigmaPipeline(words, encoder, _vae(), _filled(transformer), DPMSolverMultistepScheduler())
    pipe.save_pretrained(folder / "model")
    return folder / "model"
