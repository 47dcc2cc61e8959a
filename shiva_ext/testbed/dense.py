"""Train the testbed's dense model by flow matching (rectified flow, velocity target)."""

import copy
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

from .data import Batches, load_split
from .model import NULL_PROMPT, PromptTable, build_transformer, save_model


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
        seed: of the weights, the data order and the noise.
    """

    steps: int = 2000
    batch_size: int = 32
    lr: float = 1e-3
    warmup: int = 200
    decay: float = 0.4
    prompt_dropout: float = 0.1
    ema: float = 0.999
    seed: int = 0


def flow_matching_batch(images: torch.Tensor, sigma: torch.Tensor, generator: torch.Generator):
    """Noise images [B, ...] to level sigma [B] in [0, 1]; returns (noisy, velocity target), as in SD3."""
    noise = torch.randn(images.shape, generator=generator)
    level = sigma.view(-1, *[1] * (images.ndim - 1))
    return (1 - level) * images + level * noise, noise - images


def train(config: DenseConfig, out: str | os.PathLike, data_dir: str | None = None) -> None:
    """Train and write the model, its settings and loss curve into ``out``. Resumes from ``out/checkpoint.pt``."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    batches = Batches(*load_split("train", data_dir), config.batch_size, generator)
    model = torch.nn.ModuleDict({"transformer": build_transformer(), "prompts": PromptTable()}).train()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.01)

    def schedule(step):
        return min(1.0, (step + 1) / config.warmup, (config.steps - step) / max(1, config.decay * config.steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    step, curve, seconds = 0, [], 0.0
    checkpoint = out / "checkpoint.pt"
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        generator.set_state(state["generator"])
        step, curve, seconds = state["step"], state["curve"], state["seconds"]

    running, started = [], time.monotonic()
    with tqdm(total=config.steps, initial=step, desc="dense", mininterval=5) as bar:
        while step < config.steps:
            images, labels = batches.next()
            # Logit-normal noise levels, as SD3 trains with.
            sigma = torch.sigmoid(torch.randn(len(images), generator=generator))
            noisy, target = flow_matching_batch(images, sigma, generator)
            labels[torch.rand(len(labels), generator=generator) < config.prompt_dropout] = NULL_PROMPT
            with torch.autocast("cpu", torch.bfloat16):
                tokens, pooled = model["prompts"](labels)
                velocity = model["transformer"](noisy, tokens, pooled, sigma * 1000, return_dict=False)[0]
            loss = F.mse_loss(velocity.float(), target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            with torch.no_grad():
                decay = min(config.ema, (step + 1) / (step + 10))
                pairs = list(zip(average.parameters(), model.parameters(), strict=True))
                torch._foreach_lerp_([a for a, _ in pairs], [m for _, m in pairs], 1 - decay)
            step += 1
            running.append(loss.item())
            bar.update()
            if step % 50 == 0 or step == config.steps:
                curve.append([step, round(sum(running) / len(running), 5)])
                running = []
                bar.set_postfix(loss=curve[-1][1])
            if step % 250 == 0 or step == config.steps:
                state = dict(model=model.state_dict(), average=average.state_dict(), optimizer=optimizer.state_dict())
                state |= dict(scheduler=scheduler.state_dict(), generator=generator.get_state(), step=step)
                state |= dict(curve=curve, seconds=seconds + time.monotonic() - started)
                torch.save(state, checkpoint.with_suffix(".tmp"))
                os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
    average = average.to(torch.bfloat16)
    save_model(out, average["transformer"], average["prompts"])
    record = dict(config=asdict(config), seconds=round(seconds + time.monotonic() - started), loss=curve)
    (out / "training.json").write_text(json.dumps(record))
