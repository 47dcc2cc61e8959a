"""Training of CAF's two networks on a teacher's pairs, and of a rectified flow on the same pairs as the control."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files import write_text
from ..training.averaged import Averaged, train_averaged
from .flow import LOSSES, acceleration_target, initial_velocity, interpolate
from .model import initial_acceleration_model, initial_velocity_model, predict, scale_output
from .pairs import Pairs
from .pipeline import CAFPipeline
from .scheduler import CAFScheduler, check_h

# Labels int64 [B] to the transformer's arguments, [B, ...] each.
Condition = Callable[[Tensor], dict[str, Tensor]]


@dataclass
class CAFConfig:
    """Settings of both stages: CAF (arXiv 2411.00322), section 4 and appendix; the paper's values where it gives one.

    Attributes:
        velocity_steps, acceleration_steps: optimiser steps of the stages. The control takes as many as both together.
        batch_size: pairs a step.
        h: initial velocity as a multiple of the straight one, see :func:`~shiva_ext.caf.flow.initial_velocity`.
        loss: "huber" or "l2".
        lr: peak learning rate of AdamW (betas .9, .99).
        weight_decay: of AdamW; the published code's.
        warmup: steps of linear warm-up of each stage; the last ``decay`` share of each falls linearly to 0.
        ema: decay of the weights' moving average, which is what is kept (the published code has .9999).
        precision: "bf16" runs the networks under autocast, "fp32" does not.
        checkpoint_every: steps between two checkpoints.
        seed: of the pairs' order and of the times.
    """

    velocity_steps: int = 500_000
    acceleration_steps: int = 500_000
    batch_size: int = 512
    h: float = 1.5
    loss: str = "huber"
    lr: float = 1e-4
    weight_decay: float = 1e-5
    warmup: int = 200
    decay: float = 0.4
    ema: float = 0.999
    precision: str = "bf16"
    checkpoint_every: int = 250
    seed: int = 0

    def __post_init__(self):
        for name in ("velocity_steps", "acceleration_steps", "batch_size", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"CAFConfig: {name} is {getattr(self, name)}, wanted at least 1")
        check_h("CAFConfig", self.h)
        for name, choices in (("loss", tuple(LOSSES)), ("precision", ("bf16", "fp32"))):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"CAFConfig: {name} is {getattr(self, name)!r}, wanted one of {', '.join(map(repr, choices))}"
                )


def velocity_loss(
    model: nn.Module, x0: Tensor, x1: Tensor, t: Tensor, conditions: dict[str, Tensor], config: CAFConfig
) -> Tensor:
    """Stage V: the distance of the network's velocity on the path to v0 = h (x1 - x0), at times t [B]. Algorithm 1."""
    v0 = initial_velocity(x0, x1, config.h)
    with _precision(config, x0):
        found = predict(model, interpolate(x0, x1, v0, t), t, conditions, config.h)
    return LOSSES[config.loss](found, v0)


def acceleration_loss(
    model: nn.Module,
    velocity: nn.Module,
    x0: Tensor,
    x1: Tensor,
    t: Tensor,
    conditions: dict[str, Tensor],
    config: CAFConfig,
) -> Tensor:
    """Stage A: the distance of the network's acceleration to 2 (x1 - x0) - 2 v0, v0 = velocity(x0, 0). Algorithm 1.

    No gradient reaches the velocity network: v0 is a constant of path, input and target.
    """
    with _precision(config, x0):
        with torch.no_grad():
            v0 = predict(velocity, x0, torch.zeros_like(t), conditions, config.h)
        found = predict(model, interpolate(x0, x1, v0, t), t, conditions, config.h, v0)
    return LOSSES[config.loss](found, acceleration_target(x0, x1, v0))


def train_caf(
    teacher: nn.Module,
    pairs: Pairs,
    condition: Condition,
    out: str | os.PathLike,
    config: CAFConfig,
    resume: bool = False,
) -> Path:
    """Train the velocity network, then, with its moving average frozen, the acceleration network.

    Both run in eval mode, so that neither dropout nor dropped labels make the same pair something else.

    Args:
        teacher: a transformer to start from; it stays as it is. Trained on its device.
        pairs: of :func:`~shiva_ext.caf.pairs.make_pairs`.
        condition: labels int64 [B] to the transformer's further arguments.
        out: folder for ``pipeline`` (a :class:`CAFPipeline` without a VAE), ``training.json`` and ``checkpoints``.
        config: see :class:`CAFConfig`.
        resume: go on from the newest checkpoint. The result is that of an uninterrupted run, on the CPU bit for bit.

    Returns:
        the folder of the pipeline.

    Raises:
        TypeError: a teacher of a family that is not known here.
        ValueError: the folder holds a run that was not asked for, or has other settings or pairs.
        FloatingPointError: the loss is not finite.
    """
    out = Path(out)
    _claim(out, "caf", pairs, config, resume)
    velocity = initial_velocity_model(teacher, config.h)
    first = _train(velocity, _velocity_step(velocity, pairs, condition, config), out, "velocity", config)
    velocity = first.model
    acceleration = initial_acceleration_model(velocity, config.h)
    batch = _batches(acceleration, pairs, condition, config)
    second = _train(
        acceleration,
        lambda generator: acceleration_loss(acceleration, velocity, *batch(generator), config),
        out,
        "acceleration",
        config,
    )
    pipeline = CAFPipeline(velocity, second.model, CAFScheduler(config.h))
    _save(pipeline.to("cpu"), out / "pipeline")
    _write_record(out, pairs, config, teacher, velocity=first, acceleration=second)
    return out / "pipeline"


def train_rectified_flow(
    teacher: nn.Module,
    pairs: Pairs,
    condition: Condition,
    out: str | os.PathLike,
    config: CAFConfig,
    resume: bool = False,
) -> Path:
    """The control: one network on the same pairs with constant velocity (2-RF, arXiv 2209.03003), as many steps as CAF.

    This is stage V with h = 1 (``config.h`` is not used) for ``velocity_steps + acceleration_steps``. What is written
    has the sign of diffusers again, so ``out/transformer`` is an ordinary flow-matching model for
    ``FlowMatchEulerDiscreteScheduler``, without guidance.

    Arguments and errors as :func:`train_caf`; returns the folder of the transformer.
    """
    out = Path(out)
    config = CAFConfig(**{**asdict(config), "h": 1.0})
    _claim(out, "rectified flow", pairs, config, resume)
    model = initial_velocity_model(teacher, config.h)
    found = _train(model, _velocity_step(model, pairs, condition, config), out, "rectified_flow", config)
    _save(scale_output(found.model, -1).cpu(), out / "transformer")
    _write_record(out, pairs, config, teacher, rectified_flow=found)
    return out / "transformer"


def _precision(config: CAFConfig, x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, torch.bfloat16, enabled=config.precision == "bf16")


def _batches(model: nn.Module, pairs: Pairs, condition: Condition, config: CAFConfig):
    """``batch(generator)`` gives noise, data, times and conditions of a step, on the model's device."""
    device = next(model.parameters()).device

    def batch(generator: torch.Generator):
        x0, x1, labels = pairs.batch(config.batch_size, generator)
        t = torch.rand(config.batch_size, generator=generator)
        conditions = {name: value.to(device) for name, value in condition(labels).items()}
        return x0.to(device), x1.to(device), t.to(device), conditions

    return batch


def _velocity_step(model: nn.Module, pairs: Pairs, condition: Condition, config: CAFConfig):
    batch = _batches(model, pairs, condition, config)
    return lambda generator: velocity_loss(model, *batch(generator), config)


def _train(model: nn.Module, loss, out: Path, stage: str, config: CAFConfig) -> Averaged:
    steps = {"velocity": config.velocity_steps, "acceleration": config.acceleration_steps}
    return train_averaged(
        model,
        loss,
        steps.get(stage, sum(steps.values())),
        config,
        out / "checkpoints" / stage,
        stage,
        config.weight_decay,
        compiled=model.transformer_blocks,
    )


def check_unused(out: str | os.PathLike, resume: bool) -> None:
    """Raise ValueError if a folder holds a run that is not to be resumed."""
    if not resume and (Path(out) / "run.json").is_file():
        raise ValueError(f"shiva_ext: {out} holds a run already; resume it (--resume), or choose another folder")


def _claim(out: Path, method: str, pairs: Pairs, config: CAFConfig, resume: bool) -> None:
    """Write what a folder's run is, or compare it with the run that is there."""
    check_unused(out, resume)
    run = dict(method=method, pairs=dict(pairs.identity, count=len(pairs.noise)), config=asdict(config))
    run, file = json.loads(json.dumps(run)), out / "run.json"
    if not file.is_file():
        out.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(run, indent=1) + "\n")
        return
    before = json.loads(file.read_text())
    flat = [{**r["config"], **r["pairs"], "method": r["method"]} for r in (before, run)]
    other = [f"{k} {flat[0].get(k)} (now {v})" for k, v in flat[1].items() if flat[0].get(k) != v]
    if other:
        raise ValueError(
            f"shiva_ext: the run in {out} was started with other settings: {', '.join(other)}; resume with the same "
            "ones, or start a new run in another folder"
        )


def _save(model, folder: Path) -> None:
    """``save_pretrained`` whole or not at all."""
    unfinished = folder.with_name(f".{folder.name}.unfinished-{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(unfinished, folder)


def _write_record(out: Path, pairs: Pairs, config: CAFConfig, teacher: nn.Module, **stages: Averaged) -> None:
    device = next(teacher.parameters()).device
    record = dict(
        config=asdict(config),
        pairs=dict(pairs.identity, count=len(pairs.noise)),
        device=torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        seconds={name: round(stage.seconds) for name, stage in stages.items()},
        loss={name: stage.curve for name, stage in stages.items()},
    )
    write_text(out / "training.json", json.dumps(record) + "\n")
