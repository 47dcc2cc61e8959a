"""Which caption does a picture of the second testbed show?

A classifier over the captions of all of Twemoji, not the testbed's alone, on the same kinds of background.
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from shiva_ext.training.sampling import derive_seed

from .classifier import RECORD, WEIGHTS, conv_block, measure_features
from .emoji import SIDE, compose, load_pictures
from .flow_training import default_device
from .model import ASSETS

FEATURES = 128


@dataclass
class EmojiClassifierConfig:
    """Settings of the training run.

    Attributes:
        steps: optimiser steps.
        batch_size: pictures a step.
        lr: peak learning rate of AdamW (one cycle), weight decay 0.02.
        noise: standard deviation of noise on the pixels, so that a sampler's last traces of it do not count.
        label_smoothing: share of the target spread over all captions.
        ema: decay of the weights' moving average, which is what is saved.
        seed: of everything random.
    """

    steps: int = 6000
    batch_size: int = 256
    lr: float = 4e-3
    noise: float = 0.05
    label_smoothing: float = 0.05
    ema: float = 0.998
    seed: int = 0


class EmojiClassifier(nn.Module):
    """Six 3 x 3 convolutions with batch norm, global average pooling and one linear layer.

    Args:
        captions: the classes, in the order of the logits.
    """

    def __init__(self, captions: list[str]):
        super().__init__()
        self.captions = captions
        self.body = nn.Sequential(
            conv_block(3, 32), nn.MaxPool2d(2),
            conv_block(32, 64), nn.MaxPool2d(2),
            conv_block(64, FEATURES), nn.MaxPool2d(2),
            conv_block(FEATURES, FEATURES), nn.MaxPool2d(2),
            conv_block(FEATURES, FEATURES), conv_block(FEATURES, FEATURES),
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, len(captions))

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features: images float [B,3,64,64] in [-1, 1] -> [B,128], not negative.

        Raises:
            ValueError: the images have another shape.
        """
        if images.ndim != 4 or images.shape[1:] != (3, SIDE, SIDE):
            raise ValueError(f"EmojiClassifier: images must be [B, 3, {SIDE}, {SIDE}], got {list(images.shape)}")
        return self.body(images.contiguous(memory_format=torch.channels_last)).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, captions] of images float [B,3,64,64] in [-1, 1]."""
        return self.head(self.features(images))

    @torch.no_grad()
    def measure(self, images: Tensor, batch_size: int = 250) -> tuple[Tensor, Tensor]:
        """Features float32 [M,128] and the five likeliest captions int64 [M,5] of images [M,3,64,64].

        The images are clamped to [-1, 1] first, as any saved picture would be.

        Raises:
            ValueError: the images have another shape, or hold values that are not finite.
        """
        features = measure_features(self, images, batch_size)
        return features, self.head(features).topk(5, dim=1).indices


def train(config: EmojiClassifierConfig, out: str | os.PathLike) -> dict:
    """Train the classifier, on a GPU if there is one, and write its weights and record to ``out``.

    Returns:
        The record: settings, seconds, accuracy on fresh compositions of every picture, captions.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    device = default_device()
    pictures, captions = load_pictures(everything=True)
    pictures = pictures.to(device)
    model = EmojiClassifier(captions).to(device, memory_format=torch.channels_last).train()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(config.ema), use_buffers=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, config.steps, pct_start=0.25)
    started = time.monotonic()
    for step in tqdm(range(config.steps), desc="emoji classifier", mininterval=5):
        generator = torch.Generator().manual_seed(derive_seed(config.seed, "classifier", step))
        drawn = torch.randint(len(pictures), (config.batch_size,), generator=generator).to(device)
        images, _ = compose(pictures[drawn], generator)
        noise = torch.randn(images.shape, generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = model((images + config.noise * noise).clamp(-1, 1))
        loss = F.cross_entropy(logits.float(), drawn, label_smoothing=config.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
    seconds = round(time.monotonic() - started)
    state = {k: v.half() if v.ndim > 1 else v for k, v in average.module.state_dict().items()}
    final = average.module.eval()
    final.load_state_dict(state)  # what is written is what is measured
    images, _ = compose(pictures, torch.Generator().manual_seed(derive_seed(config.seed, "test")))
    _, found = final.measure(images)
    right = found == torch.arange(len(captions), device=device)[:, None]
    record = {"config": asdict(config), "seconds": seconds, "accuracy": right[:, 0].double().mean().item()}
    record |= {"accuracy_of_five": right.any(1).double().mean().item(), "captions": captions}
    save_file({k: v.cpu().contiguous() for k, v in state.items()}, out / f"{WEIGHTS}.tmp")
    (out / f"{RECORD}.tmp").write_text(json.dumps(record) + "\n")
    for name in (WEIGHTS, RECORD):
        os.replace(out / f"{name}.tmp", out / name)
    return record


def load_emoji_classifier(folder: str | os.PathLike | None = None) -> EmojiClassifier:
    """Load the classifier in eval mode, float32, without gradients; by default the one that ships with the package.

    Raises:
        FileNotFoundError: the folder holds no classifier.
    """
    folder = Path(folder or ASSETS / "emoji_classifier")
    missing = [name for name in (WEIGHTS, RECORD) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} holds no {missing[0]}: train it with 'shiva train emoji-classifier' first")
    model = EmojiClassifier(json.loads((folder / RECORD).read_text())["captions"])
    model.load_state_dict(load_file(folder / WEIGHTS))
    return model.to(memory_format=torch.channels_last).eval().requires_grad_(False)
