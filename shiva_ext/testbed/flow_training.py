"""Training of a testbed's dense model by flow matching (rectified flow, velocity target)."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shiva_ext import build_info
from shiva_ext.training.averaged import train_averaged


@dataclass
class DenseConfig:
    """Settings of the dense training run.

    Attributes:
        steps: optimiser steps.
        batch_size: images a step.
        lr: peak learning rate of AdamW (betas .9, .99; weight decay .01).
        warmup: steps of linear warm-up; the last ``decay`` fraction of the run falls linearly to 0.
        prompt_dropout: share of prompts replaced by the empty prompt, for classifier-free guidance.
        ema: decay of the weights' moving average, which is what is saved.
        checkpoint_every: steps between two checkpoints.
        seed: of the weights, the data order and the noise.
    """

    steps: int = 2000
    batch_size: int = 32
    lr: float = 1e-3
    warmup: int = 200
    decay: float = 0.4
    prompt_dropout: float = 0.1
    ema: float = 0.999
    checkpoint_every: int = 250
    seed: int = 0


def default_device(ops: bool = False) -> torch.device:
    """The GPU, if there is one; and if ``ops`` are wanted, only if this build has them for it."""
    usable = torch.cuda.is_available() and (not ops or build_info()["cuda"] is not None)
    return torch.device("cuda" if usable else "cpu")


def flow_matching_batch(images: Tensor, sigma: Tensor, generator: torch.Generator):
    """Noise images [B, ...] to level sigma [B] in [0, 1]; returns (noisy, velocity target), as in SD3.

    The noise is drawn on the CPU, so that a seed means the same on every device.
    """
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    level = sigma.to(images.device).view(-1, *[1] * (images.ndim - 1))
    return (1 - level) * images + level * noise, noise - images


def train_flow(
    model: nn.ModuleDict,
    next_batch: Callable[[nn.ModuleDict, int, torch.Generator], tuple[Tensor, Tensor, Tensor]],
    config: DenseConfig,
    out: Path,
) -> nn.ModuleDict:
    """Train ``model["transformer"]``, and what else is in the model, and return the moving average of its weights.

    Goes on from ``out/checkpoints``, bit for bit on the CPU. Writes ``out/training.json``: settings, seconds, losses,
    device.

    Args:
        model: holds an SD3 transformer; it is trained on the device where it lies.
        next_batch: ``next_batch(model, n, generator)`` gives images [n,C,H,W] in [-1, 1], prompt tokens [n,T,J] and
            pooled prompts [n,P] on that device, prompts dropped out already.
        config: see :class:`DenseConfig`.
        out: folder to write.
    """
    out.mkdir(parents=True, exist_ok=True)
    device = next(model.parameters()).device
    model.train()

    def loss(generator: torch.Generator) -> Tensor:
        # Logit-normal noise levels, as SD3 trains with.
        sigma = torch.sigmoid(torch.randn(config.batch_size, generator=generator)).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            images, tokens, pooled = next_batch(model, config.batch_size, generator)
            noisy, target = flow_matching_batch(images, sigma, generator)
            velocity = model["transformer"](noisy, tokens, pooled, sigma * 1000, return_dict=False)[0]
        return F.mse_loss(velocity.float(), target)

    blocks = model["transformer"].transformer_blocks
    found = train_averaged(model, loss, config.steps, config, out / "checkpoints", "dense", compiled=blocks)
    record = dict(config=asdict(config), seconds=round(found.seconds), loss=found.curve)
    record["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    (out / "training.tmp").write_text(json.dumps(record))
    os.replace(out / "training.tmp", out / "training.json")
    return found.model
