"""CAF on the first testbed: pairs of its dense model, and both trainings."""

import os
from dataclasses import replace
from pathlib import Path

import torch

from ..evaluation.image_metric import fingerprint
from ..testbed import model
from ..testbed.beds import Fashion
from ..testbed.flow_training import default_device
from ..testbed.sampling import generate
from .pairs import Pairs, make_pairs
from .train import CAFConfig, check_unused, train_caf, train_rectified_flow

TEACHER_STEPS = 25
PAIRS, PAIRS_DIR = 5000, "build/caf/pairs"
# A small model and short runs: higher rates than the paper's.
CONFIG = replace(CAFConfig(), velocity_steps=2000, acceleration_steps=2000, batch_size=32, lr=3e-4)


def fashion_pairs(
    out: str | os.PathLike = PAIRS_DIR,
    count: int = PAIRS,
    dense_model: str | os.PathLike | None = None,
    steps: int = TEACHER_STEPS,
    seed: int = 0,
    chunk: int = 100,
) -> Pairs:
    """Pairs of the testbed's dense model: guided Euler steps from noise, classes in turn, weights in bfloat16.

    Args:
        out: folder of the pairs, see :func:`~shiva_ext.caf.pairs.make_pairs`.
        count: pairs wanted.
        dense_model: the teacher's folder; by default the one that ships.
        steps: of the teacher.
        seed: of the noise.
        chunk: pairs a file.
    """
    bed = Fashion(dense_model)
    transformer, prompts = bed.load(torch.bfloat16)
    teacher = dict(model=fingerprint(bed.model_dir), steps=steps, guidance=bed.guidance)
    teacher |= dict(dtype="bfloat16", batch_size=bed.batch_size)

    def sample(labels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return generate(transformer, prompts, labels, noise, steps, bed.guidance, bed.batch_size)

    return make_pairs(out, count, sample, bed.labels, (bed.channels, bed.side, bed.side), teacher, seed, chunk)


def condition_on(prompts: model.PromptTable):
    """``condition`` of the trainings: labels int64 [B] to the transformer's arguments."""

    def condition(labels: torch.Tensor) -> dict[str, torch.Tensor]:
        tokens, pooled = prompts(labels)
        return dict(encoder_hidden_states=tokens, pooled_projections=pooled)

    return condition


def train(
    config: CAFConfig,
    out: str | os.PathLike,
    pairs: int = PAIRS,
    pairs_dir: str | os.PathLike = PAIRS_DIR,
    dense_model: str | os.PathLike | None = None,
    resume: bool = False,
    rectified_flow: bool = False,
) -> Path:
    """Make the pairs that are missing, and train CAF or, with ``rectified_flow``, the control.

    Args:
        config: see :class:`~shiva_ext.caf.train.CAFConfig`.
        out: folder to write: see :func:`~shiva_ext.caf.train.train_caf`, and ``prompts.safetensors`` beside. That of
            the control can be loaded by :func:`shiva_ext.testbed.model.load_model`.
        pairs: how many.
        pairs_dir: their folder; both trainings share it.
        dense_model: the teacher's folder, which the networks also start from; by default the one that ships.
        resume: go on from the last checkpoint.

    Returns:
        the folder of the pipeline, or of the control's transformer.
    """
    check_unused(out, resume)  # before an hour of pairs
    found = fashion_pairs(pairs_dir, pairs, dense_model)
    transformer, prompts = model.load_model(dense_model)
    run = train_rectified_flow if rectified_flow else train_caf
    folder = run(transformer.to(default_device()), found, condition_on(prompts), out, config, resume)
    model.save_prompts(out, prompts)
    return folder
