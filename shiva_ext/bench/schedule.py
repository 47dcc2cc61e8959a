"""``shiva bench schedule``: what one more token is worth by layer and noise level, beside what is kept there."""

import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from ..artifact import ShivaArtifact
from ..selection.allocation import LOWEST
from ..testbed.model import ASSETS, load_model
from ..testbed.train_shiva import TESTBED_CONFIG, batch_source
from ..training.trainer import ShivaTrainer
from .pareto import write_content

ARTEFACTS = ("shiva60", "shiva50")
_NEAR = 0.01  # of a bound, in which a ratio was rounded to tokens


class Worth(NamedTuple):
    """What one more token is worth.

    Attributes:
        sigmas: noise levels, float32 [S].
        ratios: share of tokens kept, float32 [S,L].
        values: how much the squared distance to the dense output falls per unit of each ratio, float64 [S,L].
    """

    sigmas: torch.Tensor
    ratios: torch.Tensor
    values: torch.Tensor

    @property
    def spread(self) -> float:
        """Standard deviation of the values as a share of their mean, where ratios are at neither bound.

        0 at the best schedule, NaN where all ratios are at a bound.
        """
        free = (self.ratios > LOWEST + _NEAR) & (self.ratios < 1 - _NEAR)
        values = self.values.double()[free]
        return (values.std(correction=0) / values.mean()).item()


def values_of(folder: str | os.PathLike, budget: float | None = None, samples: int = 64, seed: int = 0) -> Worth:
    """What tokens are worth to an artefact of the first testbed, by differences.

    Args:
        folder: the artefact.
        budget: its table is moved to; by default its own.
        samples: of the training split at each of ten noise levels.
        seed: of the samples and their noise.

    Raises:
        FileNotFoundError, ValueError: it is no artefact of Shiva's, or the budget is out of range.
    """
    artifact = ShivaArtifact.load(folder)
    budget = artifact.table.mean() if budget is None else budget
    if not LOWEST <= budget <= 1:
        raise ValueError(f"shiva bench schedule: budget is {budget:g}, wanted a share from {LOWEST:g} to 1")
    training = artifact.metadata["training"]
    router = artifact.router.config
    config = replace(
        TESTBED_CONFIG, budget=budget, schedule="measured", schedule_samples=samples, start_from=str(folder), seed=seed,
        adapter_rank=training["adapter_rank"], share=router.share, hidden=router.hidden, router_steps=0,
        first_layer=router.first_layer, share_selection=artifact.share_selection,
    )  # fmt: skip
    transformer, prompts = load_model()
    trainer = ShivaTrainer(transformer, config, batch_source(prompts, config.prompt_dropout))
    try:
        if artifact.adapter is not None:
            trainer.add_adapters()
        schedule = trainer.schedule
        return Worth(schedule.sigmas, schedule.ratios, trainer.ratio_values(0))
    finally:
        trainer.close()


def _table(title: str, worth: Worth) -> Table:
    table = Table(title=title)
    table.add_column("noise level")
    for layer in range(worth.ratios.shape[1]):
        table.add_column(f"layer {layer}", justify="right")
    for sigma, kept, values in zip(*(each.tolist() for each in worth), strict=True):
        cells = (f"{k:.2f}  {v:.3f}" if k < 1 else "dense" for k, v in zip(kept, values, strict=True))
        table.add_row(f"{sigma:.1f}", *cells)
    return table


def run(
    artefacts: list[str] | None = None,
    budget: float | None = None,
    samples: int = 64,
    out: str | os.PathLike = "results",
) -> dict:
    """Print, for each artefact, the share of tokens kept and what one more is worth; write ``schedule.json``.

    Args:
        artefacts: folders, or names of those that ship; by default those with a learned and with a measured schedule.
        budget: all are moved to; by default each at its own.
        samples: at each noise level.
        out: folder of the file.
    """
    found = {}
    for name in artefacts or ARTEFACTS:
        folder = name if Path(name).is_dir() else ASSETS / name
        worth = values_of(folder, budget, samples)
        found[str(name)] = {each: tensor.tolist() for each, tensor in worth._asdict().items()} | {
            "spread": worth.spread
        }
        title = f"{Path(folder).name}: share of tokens kept, and what one more is worth (spread {worth.spread:.2f})"
        Console(width=120).print(_table(title, worth))
    command = f"shiva bench schedule --samples {samples}" + (f" --budget {budget:g}" if budget is not None else "")
    command += f" --artefacts {' '.join(artefacts)}" if artefacts else ""
    write_content(Path(out) / "schedule.json", {"command": command, "samples": samples, "artefacts": found})
    return found
