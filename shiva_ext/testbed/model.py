"""The testbed's dense model: a small text-conditional ``SD3Transformer2DModel`` and its table of prompts."""

import os
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import nn

from .data import CLASSES, IMAGE_SIZE

NULL_PROMPT = len(CLASSES)  # the row of the empty prompt
PROMPT_TOKENS = 4
PROMPT_DIM = 64
ASSETS = Path(__file__).parent / "assets"

TRANSFORMER_CONFIG = dict(
    sample_size=IMAGE_SIZE,
    patch_size=2,
    in_channels=1,
    out_channels=1,
    num_layers=6,
    num_attention_heads=2,
    attention_head_dim=64,
    joint_attention_dim=PROMPT_DIM,
    caption_projection_dim=128,
    pooled_projection_dim=PROMPT_DIM,
    pos_embed_max_size=IMAGE_SIZE // 2,
    qk_norm="rms_norm",
)


class PromptTable(nn.Module):
    """Learned embeddings of the ten class names and of the empty prompt, in place of a text encoder.

    Attributes:
        tokens: [11, PROMPT_TOKENS, PROMPT_DIM]; what a text encoder's last hidden state would be.
        pooled: [11, PROMPT_DIM]; what its pooled output would be.
    """

    def __init__(self):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(len(CLASSES) + 1, PROMPT_TOKENS, PROMPT_DIM))
        self.pooled = nn.Parameter(torch.randn(len(CLASSES) + 1, PROMPT_DIM))

    def forward(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """labels int64 [B] (10 is the empty prompt) to tokens [B, T, J] and pooled [B, P]."""
        return self.tokens[labels], self.pooled[labels]

    def encode(self, prompts: str | list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed class names; ``""`` is the empty prompt.

        Raises:
            ValueError: a prompt is not a class name; the message lists them.
        """
        names = [*CLASSES, ""]
        prompts = [prompts] if isinstance(prompts, str) else prompts
        unknown = [p for p in prompts if p not in names]
        if unknown:
            raise ValueError(f"the testbed model knows the prompts {', '.join(CLASSES)} and '', got {unknown[0]!r}")
        return self(torch.tensor([names.index(p) for p in prompts]))


def build_transformer(**overrides) -> SD3Transformer2DModel:
    """A freshly initialised testbed transformer."""
    return SD3Transformer2DModel(**{**TRANSFORMER_CONFIG, **overrides})


def save_model(folder: str | os.PathLike, transformer: nn.Module, prompts: PromptTable) -> None:
    """Write ``transformer/`` (diffusers layout) and ``prompts.safetensors`` into ``folder``."""
    transformer.save_pretrained(Path(folder) / "transformer")
    save_prompts(folder, prompts)


def save_prompts(folder: str | os.PathLike, prompts: PromptTable) -> None:
    """Write ``prompts.safetensors`` into ``folder``."""
    folder = Path(folder)
    temporary = folder / "prompts.safetensors.tmp"
    save_file({k: v.contiguous() for k, v in prompts.state_dict().items()}, temporary)
    os.replace(temporary, folder / "prompts.safetensors")


def load_model(folder: str | os.PathLike | None = None, dtype: torch.dtype = torch.float32):
    """Load the dense model.

    Args:
        folder: as written by :func:`save_model`; by default the one that ships with the package.
        dtype: of the weights.

    Returns:
        (transformer, prompts), both in eval mode and without gradients.
    """
    folder = Path(folder or ASSETS / "dense")
    transformer = SD3Transformer2DModel.from_pretrained(folder / "transformer", torch_dtype=dtype)
    return transformer.eval().requires_grad_(False), load_prompts(folder, dtype)


def load_prompts(folder: str | os.PathLike, dtype: torch.dtype = torch.float32) -> PromptTable:
    """Load what :func:`save_prompts` has written, in eval mode and without gradients."""
    prompts = PromptTable()
    prompts.load_state_dict(load_file(Path(folder) / "prompts.safetensors"))
    return prompts.to(dtype).eval().requires_grad_(False)


def build_pipeline(transformer: SD3Transformer2DModel) -> StableDiffusion3Pipeline:
    """Diffusers' own pipeline around the model; it works on pixels, so call it with ``output_type="latent"``."""
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
