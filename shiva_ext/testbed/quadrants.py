"""A small vision-language model that must look at the right place (``shiva train vlm``).

A picture of four Fashion-MNIST images, two by two, 14 x 14 visual tokens, and a question: which quadrant? The answer is
the class of the image there. Whoever prunes the visual tokens by position loses some of the quadrants.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from ..files import write_text
from ..training.averaged import train_averaged
from .data import load_split, to_float

VLM_DIR = "build/vlm"
SIDE, PATCH, TOKENS = 56, 4, 14
BOS, IMAGE, ASK, FIRST_QUADRANT, FIRST_CLASS, VOCABULARY = 1, 2, 3, 4, 8, 18
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")


@dataclass
class VLMConfig:
    """Settings of the training.

    Attributes:
        steps, batch_size: of the training; the last ``decay`` share of it falls linearly to 0.
        lr, warmup: of AdamW, and the steps of linear warm-up.
        layers, width: of the Llama; heads of 64 channels.
        ema: decay of the weights' moving average, which is what is saved.
        checkpoint_every: steps between two checkpoints.
        seed: of the weights and the pictures.
    """

    steps: int = 2000
    batch_size: int = 32
    lr: float = 1e-3
    warmup: int = 100
    decay: float = 0.4
    layers: int = 8
    width: int = 128
    ema: float = 0.995
    checkpoint_every: int = 250
    seed: int = 0


def build(config: VLMConfig) -> LlavaForConditionalGeneration:
    """A LLaVA with fresh weights: a CLIP of two layers, a Llama with rotary positions."""
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=SIDE,
        patch_size=PATCH,
        num_channels=1,
    )
    heads = config.width // 64
    text = LlamaConfig(
        hidden_size=config.width,
        intermediate_size=2 * config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=BOS,
        eos_token_id=0,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=IMAGE,
            image_seq_length=TOKENS**2,
            vision_feature_layer=-1,
        )
    )


def questions(images: Tensor, labels: Tensor, count: int, generator: torch.Generator) -> tuple[dict, Tensor]:
    """Random pictures and questions.

    Args:
        images: uint8 [M,1,32,32], 28 x 28 and a border, as :func:`~.data.load_split` gives them.
        labels: [M].
        count: how many.
        generator: of the choice.

    Returns:
        arguments of the model, and the classes asked for, int64 [count].
    """
    chosen = torch.randint(len(images), (count, 4), generator=generator)
    tiles = to_float(images[chosen.flatten()]).view(count, 2, 2, *images.shape[-2:])
    edge = (tiles.shape[-1] - SIDE // 2) // 2
    tiles = tiles[..., edge : edge + SIDE // 2, edge : edge + SIDE // 2]
    pixels = tiles.permute(0, 1, 3, 2, 4).reshape(count, 1, SIDE, SIDE)
    quadrant = torch.randint(4, (count,), generator=generator)
    ids = torch.full((count, TOKENS**2 + 3), IMAGE)
    ids[:, 0], ids[:, -2], ids[:, -1] = BOS, FIRST_QUADRANT + quadrant, ASK
    wanted = labels[chosen.gather(1, quadrant[:, None])[:, 0]].long()
    return dict(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)), wanted


def answer(model: nn.Module, asked: dict) -> Tensor:
    """Logits of the ten classes [B,10]."""
    logits = model(**asked, logits_to_keep=1).logits[:, -1]
    return logits[:, FIRST_CLASS : FIRST_CLASS + 10]


def train(config: VLMConfig, out: str | os.PathLike, data_dir: str | None = None) -> None:
    """Train and write the model (transformers' layout) and ``training.json``. Goes on from ``out/checkpoints``."""
    torch.manual_seed(config.seed)
    out, (images, labels) = Path(out), load_split("train", data_dir)
    out.mkdir(parents=True, exist_ok=True)
    model = build(config).train()

    def loss(generator: torch.Generator) -> Tensor:
        asked, wanted = questions(images, labels, config.batch_size, generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = answer(model, asked)
        return F.cross_entropy(logits.float(), wanted)

    found = train_averaged(model, loss, config.steps, config, out / "checkpoints", "vlm")
    found.model.save_pretrained(out)
    write_text(
        out / "training.json",
        json.dumps(dict(config=asdict(config), seconds=round(found.seconds), loss=found.curve)),
    )


def load(folder: str | os.PathLike) -> LlavaForConditionalGeneration:
    """The model that :func:`train` wrote, in eval mode."""
    return LlavaForConditionalGeneration.from_pretrained(folder).eval().requires_grad_(False)
