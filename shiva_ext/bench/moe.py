"""Experts on the testbed against the dense model at equal compute a token (``shiva bench moe``)."""

import json
import os
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from .. import moe
from ..evaluation.pareto import DEVIATIONS
from ..testbed.beds import Fashion
from ..testbed.data import load_split, to_float
from ..testbed.experts import CONTROL_DIR, EXPERTS_DIR
from ..testbed.flow_training import flow_matching_batch
from ..testbed.model import load_model, load_prompts
from ..testbed.sampling import generate
from .moe_figure import draw
from .pareto import write_content

STEPS = 10
DENSE, CONTROL, EXPERTS = "dense, as it ships", "dense, trained on", "experts"


def held_out_loss(transformer, prompts, count: int, batch_size: int, data_dir: str | None = None) -> float:
    """The flow-matching loss on the first test pictures, the same noise and levels for every model."""
    images, labels = load_split("test", data_dir)
    generator, errors = torch.Generator().manual_seed(0), []
    dtype = next(transformer.parameters()).dtype
    for first in range(0, count, batch_size):
        pixels, classes = to_float(images[first : first + batch_size]), labels[first : first + batch_size].long()
        sigma = torch.sigmoid(torch.randn(len(pixels), generator=generator))
        noisy, target = flow_matching_batch(pixels, sigma, generator)
        tokens, pooled = (each.to(dtype) for each in prompts(classes))
        with torch.no_grad():
            velocity = transformer(noisy.to(dtype), tokens, pooled, sigma * 1000, return_dict=False)[0]
        errors += (velocity.float() - target).square().mean(dim=(1, 2, 3)).tolist()
    return statistics.fmean(errors)


def routing_maps(transformer, prompts, bed: Fashion, count: int) -> tuple[Tensor, Tensor]:
    """Where the choices go while pictures are made.

    Returns:
        load float [STEPS, layers, n]: each expert's share of a step's choices.
        position float [layers, N, n]: each expert's share of the choices of the token at each position.
    """
    load, position = [], 0
    labels, noise = bed.labels(count), bed.noise(count, seed=1)
    with moe.record_routing(transformer) as routing:
        generate(transformer, prompts, labels, noise, STEPS, bed.guidance, count)
    layers = list(routing.calls.values())
    n = len(layers[0][0].count)
    for step in range(STEPS):
        counts = torch.stack([found[step].count.double() for found in layers])
        load.append(counts / counts.sum(dim=1, keepdim=True))
        chosen = torch.stack([F.one_hot(found[step].experts, n).sum(dim=1).double() for found in layers])
        position = position + chosen.unflatten(1, (2 * count, -1)).mean(dim=1) / STEPS
    return torch.stack(load), position / position.sum(dim=-1, keepdim=True)


def dependence(shares: Tensor) -> float:
    """How much of the expert's entropy an axis explains, 0 to 1: shares [places, n], each place as likely."""
    mean = shares.mean(dim=0)
    entropy = -(mean * mean.clamp_min(1e-12).log()).sum()
    within = -(shares * shares.clamp_min(1e-12).log()).sum(dim=1).mean()
    return ((entropy - within) / entropy).item()


def timing(models: dict, bed: Fashion, repeats: int) -> dict[str, float]:
    """Seconds a picture of each, in turns, medians."""
    labels, noise, taken = bed.labels(bed.batch_size), bed.noise(bed.batch_size, 0), {name: [] for name in models}
    for _ in range(repeats + 1):
        for name, (transformer, prompts) in models.items():
            started = time.perf_counter()
            generate(transformer, prompts, labels, noise, STEPS, bed.guidance, bed.batch_size)
            taken[name].append((time.perf_counter() - started) / bed.batch_size)
    return {name: statistics.median(each[1:]) for name, each in taken.items()}


def run(
    samples: int = 1000,
    experts: str | os.PathLike = EXPERTS_DIR,
    control: str | os.PathLike = CONTROL_DIR,
    dense_model: str | os.PathLike | None = None,
    data_dir: str | None = None,
    out: str | os.PathLike = "results",
    repeats: int = 5,
) -> dict:
    """Measure the three models and write ``moe.json`` and ``moe.png`` into ``out``.

    Args:
        samples: pictures a model; the same noise for all. Also how many test pictures the held-out loss is of.
        experts, control: folders of 'shiva train experts', without and with ``--control``.
        dense_model: the model that both began as; by default the one that ships.
        data_dir: of Fashion-MNIST.
        out: folder of the results.
        repeats: of the timing.

    Raises:
        FileNotFoundError: a training is missing.
        ValueError: fewer than two samples.
    """
    if samples < 2:
        raise ValueError(f"shiva bench moe: samples is {samples}, wanted at least 2")
    folders = {CONTROL: Path(control), EXPERTS: Path(experts)}
    for name, folder in folders.items():
        if not (folder / "training.json").is_file():
            option = " --control" if name == CONTROL else ""
            raise FileNotFoundError(f"{folder} has no training.json; run 'shiva train experts{option} --out {folder}'")
    bed = Fashion(dense_model)
    models = {DENSE: bed.load(torch.bfloat16), CONTROL: load_model(control, torch.bfloat16)}
    sparse = moe.load(Path(experts) / "transformer").requires_grad_(False)
    models[EXPERTS] = (sparse, load_prompts(experts, torch.bfloat16))
    labels, noise = bed.labels(samples), bed.noise(samples, seed=0)
    seconds, rows = timing(models, bed, repeats), []
    for name, (transformer, prompts) in models.items():
        images = generate(transformer, prompts, labels, noise, STEPS, bed.guidance, bed.batch_size)
        total, active = moe.count_parameters(transformer)
        rows.append(
            dict(
                name=name,
                parameters=total,
                active=active,
                held_out_loss=held_out_loss(transformer, prompts, samples, 50, data_dir),
                **bed.quality(images, labels),
                seconds=seconds[name],
                relative_time=seconds[name] / seconds[DENSE],
            )
        )
    load, position = routing_maps(*models[EXPERTS], bed, 20)
    training = {name: json.loads((folder / "training.json").read_text()) for name, folder in folders.items()}
    apart = [a - b for a, b in zip(rows[2]["fid_draws"], rows[1]["fid_draws"], strict=True)]
    content = dict(
        command=f"shiva bench moe --samples {samples}",
        steps=STEPS,
        training={name: {k: record[k] for k in ("config", "seconds", "loss")} for name, record in training.items()},
        rows=rows,
        difference=dict(fid=rows[2]["fid"] - rows[1]["fid"], error=DEVIATIONS * statistics.stdev(apart)),
        load=[[[round(x, 4) for x in layer] for layer in step] for step in load.tolist()],
        explained_by_step=[round(dependence(load[:, layer]), 4) for layer in range(load.shape[1])],
        explained_by_position=[round(dependence(each), 4) for each in position],
    )
    file = Path(out) / "moe.json"
    write_content(file, content)
    draw(training, load, position, file.with_suffix(".png"))
    _print(content)
    return content


def _print(content: dict) -> None:
    table = Table(title="experts and the dense model, equal compute a token")
    for column in ("", "parameters", "active", "held-out loss", "FID", "accuracy", "time"):
        table.add_column(column)
    for row in content["rows"]:
        table.add_row(
            row["name"],
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['active'] / 1e6:.2f} M",
            f"{row['held_out_loss']:.4f}",
            f"{row['fid']:.3f} ± {row['fid_error']:.3f}",
            f"{row['accuracy']:.3f}",
            f"{row['relative_time']:.2f}x",
        )
    console = Console(width=110)
    console.print(table)
    by_step, by_position = content["explained_by_step"], content["explained_by_position"]
    console.print(f"of the expert's entropy the step explains {by_step}, the position {by_position}, by layer")
