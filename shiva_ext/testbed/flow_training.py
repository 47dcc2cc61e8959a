"""Training of a testbed's dense model by flow matching (rectified flow, velocity target)."""

import copy
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from shiva_ext import build_info
from shiva_ext.training import checkpoint
from shiva_ext.training.sampling import derive_seed


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
    average = copy.deepcopy(model).requires_grad_(False)
    if device.type == "cuda":  # small kernels: the host cannot start them as fast as they end
        for block in model["transformer"].transformer_blocks:
            block.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.01)
    step, curve, running, seconds = 0, [], [], 0.0
    folder = out / "checkpoints"
    found = checkpoint.latest(folder) if folder.exists() else None
    if found is not None:
        tensors, record = found
        if record["config"] != asdict(config):
            raise ValueError(f"shiva_ext: {out} holds a run with other settings; choose another folder")
        parts = {
            name: {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}
            for name in ("model.", "average.", "optimizer.")
        }
        model.load_state_dict(parts["model."])
        average.load_state_dict(parts["average."])
        checkpoint.unflatten(optimizer, parts["optimizer."])
        step, curve, running, seconds = (record[name] for name in ("step", "curve", "running", "seconds"))
    started = time.monotonic()
    with tqdm(total=config.steps, initial=step, desc="dense model", mininterval=5) as bar:
        while step < config.steps:
            generator = torch.Generator().manual_seed(derive_seed(config.seed, "dense", step))
            for group in optimizer.param_groups:
                fall = (config.steps - step) / max(1, config.decay * config.steps)
                group["lr"] = config.lr * min(1.0, (step + 1) / config.warmup, fall)
            # Logit-normal noise levels, as SD3 trains with.
            sigma = torch.sigmoid(torch.randn(config.batch_size, generator=generator)).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                images, tokens, pooled = next_batch(model, config.batch_size, generator)
                noisy, target = flow_matching_batch(images, sigma, generator)
                velocity = model["transformer"](noisy, tokens, pooled, sigma * 1000, return_dict=False)[0]
            loss = F.mse_loss(velocity.float(), target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                decay = min(config.ema, (step + 1) / (step + 10))
                pairs = list(zip(average.parameters(), model.parameters(), strict=True))
                torch._foreach_lerp_([a for a, _ in pairs], [m for _, m in pairs], 1 - decay)
            step += 1
            running.append(loss.detach())
            bar.update()
            due = step % config.checkpoint_every == 0 or step == config.steps
            if step % 50 == 0 or due:  # not each step: to read one waits for the device
                running = [float(each) for each in running]
            if step % 50 == 0 or step == config.steps:
                curve.append([step, round(sum(running) / len(running), 5)])
                running = []
                bar.set_postfix(loss=curve[-1][1])
            if due:
                tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
                tensors |= {f"average.{k}": v for k, v in average.state_dict().items()}
                tensors |= {f"optimizer.{k}": v for k, v in checkpoint.flatten(optimizer).items()}
                spent = seconds + time.monotonic() - started
                record = dict(config=asdict(config), curve=curve, running=running, seconds=spent)
                checkpoint.write(folder, step, tensors, record, keep=2)
    record = dict(config=asdict(config), seconds=round(seconds + time.monotonic() - started), loss=curve)
    record["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    (out / "training.tmp").write_text(json.dumps(record))
    os.replace(out / "training.tmp", out / "training.json")
    return average
