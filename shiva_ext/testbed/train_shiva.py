"""Train the testbed's selection: the three stages on Fashion-MNIST, one artefact per budget, and the dense control."""

import os
from pathlib import Path

import torch

from shiva_ext.training.config import TrainConfig
from shiva_ext.training.display import make_display
from shiva_ext.training.loop import TrainingLoop
from shiva_ext.training.method_trainer import MethodTrainer
from shiva_ext.training.trainer import Batch, ShivaTrainer

from .data import Batches, load_split
from .model import NULL_PROMPT, load_model

# Short runs on a small model: higher rates than the paper's, and the teacher's output in place of noisy data.
TESTBED_CONFIG = TrainConfig(
    router_steps=300,
    policy_steps=150,
    joint_steps=2000,
    batch_size=16,
    micro_batches=2,
    lr_router=2e-3,
    lr_policy=1e-3,
    lr_adapter=1e-3,
    warmup=50,
    diffusion_weight=0.5,
    output_weight=1.0,
    feature_weight=0.1,
    # At a fifth of this the policy stays well above the budget until late, and the adapters see the wrong counts.
    budget_weight=2.5,
    adapter_rank=32,
)


PROMPT_ARGUMENTS = "encoder_hidden_states", "pooled_projections"


def batch_source(prompts, prompt_dropout: float, data_dir: str | None = None):
    """``next_batch`` of :class:`ShivaTrainer` on the training split."""
    images, labels = load_split("train", data_dir)
    empty = dict(zip(PROMPT_ARGUMENTS, prompts(torch.tensor([NULL_PROMPT])), strict=True))

    def next_batch(count: int, generator: torch.Generator) -> Batch:
        pixels, classes = Batches(images, labels, count, generator).next()
        classes = classes.clone()
        classes[torch.rand(count, generator=generator) < prompt_dropout] = NULL_PROMPT
        return Batch(pixels, dict(zip(PROMPT_ARGUMENTS, prompts(classes), strict=True)), empty)

    return next_batch


def make_trainer(transformer, config: TrainConfig, source, display, control: bool = False) -> TrainingLoop:
    """The trainer of ``config.method``, or of the dense control."""
    if config.method == "shiva":
        return ShivaTrainer(transformer, config, source, dense=control, display=display)
    return MethodTrainer(transformer, config, source, display=display)


def train(
    config: TrainConfig,
    out: str | os.PathLike,
    dense_model: str | os.PathLike | None = None,
    data_dir: str | None = None,
    control: bool = False,
    resume: bool = False,
) -> Path:
    """Train one artefact (or, with ``control``, the dense fine-tune of as many joint steps) and write it to ``out``.

    Another method (``config.method``) trains in one stage: give it as many ``joint_steps`` as Shiva's stages together.
    """
    if control and config.method != "shiva":
        raise ValueError(f"shiva train testbed: the control has no method, got {config.method!r}; leave one out")
    transformer, prompts = load_model(dense_model)
    source, display = batch_source(prompts, config.prompt_dropout, data_dir), make_display(True)
    trainer = make_trainer(transformer, config, source, display, control)
    try:
        trainer.run(Path(out) / "checkpoints", resume)
        trainer.export(out)
    finally:
        display.close()
        trainer.close()
    return Path(out)
