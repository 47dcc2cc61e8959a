"""Plain training of one model whose moving average is wanted: warm-up, linear fall, checkpoints."""

import copy
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import checkpoint
from .sampling import derive_seed

_NOTE_EVERY = 50  # steps that an entry of the loss curve is the mean of


class Settings(Protocol):
    """What the loop reads of a dataclass of settings; all of its fields must be equal to go on with a run.

    Attributes:
        lr: peak learning rate of AdamW (betas .9, .99).
        warmup: steps of linear warm-up; the last ``decay`` share of the run falls linearly to 0.
        ema: decay of the weights' moving average.
        checkpoint_every: steps between two checkpoints.
        seed: of what the loss draws.
    """

    lr: float
    warmup: int
    decay: float
    ema: float
    checkpoint_every: int
    seed: int


class Averaged(NamedTuple):
    """A finished run.

    Attributes:
        model: the moving average of the weights.
        curve: [step, mean loss since the entry before] every 50 steps.
        seconds: of all sessions together.
    """

    model: nn.Module
    curve: list
    seconds: float


def train_averaged(
    model: nn.Module,
    loss: Callable[[torch.Generator], Tensor | tuple[Tensor, Tensor]],
    steps: int,
    config: Settings,
    folder: Path,
    name: str,
    weight_decay: float = 0.01,
    compiled: Iterable[nn.Module] = (),
    before_step: Callable[[int], None] | None = None,
) -> Averaged:
    """Train a model for a number of steps; go on from the newest checkpoint, bit for bit on the CPU.

    Args:
        model: trained where it lies, in the mode (train or eval) that it is in.
        loss: the loss of one step, a scalar that depends on the model and the generator alone. Every step has a
            generator of its own, seeded by (seed, name, step). Where it gives two, the second is what the curve shows.
        steps: length of the run.
        config: see :class:`Settings`.
        folder: of the checkpoints.
        name: of the run, for its seeds and the progress bar.
        weight_decay: of AdamW.
        before_step: called with each step's number, from 0, for what changes in the course of the run.
        compiled: parts of the model to compile on a GPU, whose small kernels the host cannot start as fast as they end.

    Raises:
        ValueError: the folder holds a run with other settings.
        FloatingPointError: the loss is not finite; the last checkpoint is from before.
    """
    device = next(model.parameters()).device
    average = copy.deepcopy(model).requires_grad_(False)
    if device.type == "cuda":
        for part in compiled:
            part.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=weight_decay)
    step, curve, running, seconds = 0, [], [], 0.0
    found = checkpoint.latest(folder) if folder.exists() else None
    if found is not None:
        tensors, record = found
        if record["config"] != asdict(config):
            raise ValueError(f"shiva_ext: {folder} holds a run with other settings; choose another folder")
        parts = {
            prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            for prefix in ("model.", "average.", "optimizer.")
        }
        model.load_state_dict(parts["model."])
        average.load_state_dict(parts["average."])
        checkpoint.unflatten(optimizer, parts["optimizer."])
        step, curve, running, seconds = (record[key] for key in ("step", "curve", "running", "seconds"))
    started = time.monotonic()
    with tqdm(total=steps, initial=step, desc=name, mininterval=5) as bar:
        while step < steps:
            generator = torch.Generator().manual_seed(derive_seed(config.seed, name, step))
            for group in optimizer.param_groups:
                fall = (steps - step) / max(1, config.decay * steps)
                group["lr"] = config.lr * min(1.0, (step + 1) / max(1, config.warmup), fall)
            if before_step is not None:
                before_step(step)
            error = loss(generator)
            error, shown = error if isinstance(error, tuple) else (error, error)
            optimizer.zero_grad(set_to_none=True)
            error.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                decay = min(config.ema, (step + 1) / (step + 10))
                pairs = list(zip(average.parameters(), model.parameters(), strict=True))
                torch._foreach_lerp_([a for a, _ in pairs], [m for _, m in pairs], 1 - decay)
            step += 1
            running.append(shown.detach())
            bar.update()
            due = step % config.checkpoint_every == 0 or step == steps
            if step % _NOTE_EVERY == 0 or due:  # not each step: to read one waits for the device
                running = [float(each) for each in running]
                if not all(map(math.isfinite, running)):
                    raise FloatingPointError(
                        f"shiva_ext: {name} has a loss that is not finite, at or shortly before step {step}; look at "
                        "the data, or start a new run with a lower learning rate"
                    )
            if step % _NOTE_EVERY == 0 or step == steps:
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
    return Averaged(average, curve, seconds + time.monotonic() - started)
