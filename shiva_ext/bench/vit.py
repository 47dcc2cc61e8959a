"""Accuracy of a small vision transformer against patches kept and time (``shiva bench vit``)."""

import os
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import shiva_ext

from ..files import write_figure
from ..testbed import vit as bed
from ..testbed.data import load_split
from ..vit import PatchPruner
from ..vit.handle import get_patches
from .pareto import write_content

KEEPS = (0.8, 0.6, 0.4, 0.2)
NAMES = {
    "tnt": "TNT",
    "tnt_rescaled": "TNT, rescaled",
    "tnt_released": "TNT as released",
    "dynamicvit": "Gumbel (DynamicViT)",
    "counterfactual": "counterfactual",
    "residual": "residual",
    "random": "random",
    "random_pass_by": "random, passing by",
}
BATCH = 100


@dataclass(frozen=True)
class Row:
    """A model and what is changed in its pruner's settings; keep is None for a dense one."""

    name: str
    folder: str
    keep: float | None = None
    norm_in_eval: bool | None = None


def rows() -> list[Row]:
    found = [Row("dense", bed.DENSE), Row("dense, trained on", bed.DENSE_ON)]
    for key, name in NAMES.items():
        released = key == "tnt_released"
        for keep in KEEPS:
            found.append(Row(name, "tnt" if released else key, keep, False if released else None))
    return found


def flops(lengths: list[int], width: int) -> float:
    """Multiplications and additions of blocks that work on so many tokens, an MLP of 4 widths."""
    return float(sum(24 * n * width**2 + 4 * n**2 * width for n in lengths))


def _model(folder: Path, row: Row) -> tuple[nn.Module, PatchPruner | None]:
    vit, pruner = bed.load(folder / row.folder)
    if pruner is not None:
        changes = {"keep": row.keep} | ({} if row.norm_in_eval is None else {"norm_in_eval": row.norm_in_eval})
        pruner.config = replace(pruner.config, **changes)
        shiva_ext.enable(vit, pruner)
    return vit, pruner


def _seconds(vit: nn.Module, batch: Tensor) -> float:
    begun = time.perf_counter()
    vit(batch)
    return time.perf_counter() - begun


@torch.no_grad()
def run(
    folder: str | os.PathLike = bed.VIT_DIR,
    samples: int = 10000,
    repeats: int = 15,
    data_dir: str | None = None,
    out: str | os.PathLike = "results",
) -> dict:
    """Measure every way to prune at every share; write ``vit.json`` and ``vit.png`` into ``out``.

    Times are of a batch of 100 in bfloat16 autocast, each beside the dense model's, medians.

    Args:
        folder: of 'shiva train vit'.
        samples: test pictures.
        repeats: timed pairs a row.
        data_dir: of Fashion-MNIST.
        out: folder of the results.

    Raises:
        FileNotFoundError: a model is not there.
    """
    folder = Path(folder)
    missing = [row.folder for row in rows() if not (folder / row.folder / "config.json").is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no {', '.join(dict.fromkeys(missing))}; run 'shiva train vit --out {folder}'"
        )
    images, labels = load_split("test", data_dir)
    images, labels = images[:samples], labels[:samples]
    dense, _ = bed.load(folder / bed.DENSE)
    measured = [_measure(folder, row, dense, images, labels, repeats) for row in rows()]
    content = dict(command=f"shiva bench vit --samples {samples} --repeats {repeats}", rows=measured)
    file = Path(out) / "vit.json"
    write_content(file, content)
    _draw(measured, file.with_suffix(".png"))
    _print(measured)
    return content


def _measure(folder: Path, row: Row, dense: nn.Module, images: Tensor, labels: Tensor, repeats: int) -> dict:
    vit, pruner = _model(folder, row)
    parts = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    batch = bed.pixels(parts[0][0])
    with torch.autocast("cpu", torch.bfloat16):
        logits = [vit(bed.pixels(part)).logits.float() for part, _ in parts]
        pairs = [(_seconds(dense, batch), _seconds(vit, batch)) for _ in range(repeats)]
    logits = torch.cat(logits)
    right = (logits.argmax(dim=1) == labels).double()
    handle = get_patches(vit)
    config = vit.config
    lengths = handle.lengths if handle else [(bed.SIDE // bed.PATCH) ** 2 + 1] * config.num_hidden_layers
    return dict(
        name=row.name,
        keep=row.keep,
        accuracy=right.mean().item(),
        error=1.96 * right.std().item() / len(right) ** 0.5,
        cross_entropy=F.cross_entropy(logits, labels).item(),
        mflops=flops(lengths, config.hidden_size) / 1e6,
        patches=statistics.fmean(length - 1 for length in lengths),
        speed=statistics.median(before / after for before, after in pairs),
    )


def _draw(measured: list[dict], file: Path) -> None:
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    axes = figure.subplots(1, 2)
    for number, name in enumerate(NAMES.values()):
        found = [row for row in measured if row["name"] == name]
        for axis, value in zip(axes, ("patches", "speed"), strict=True):
            x = [row[value] if value == "patches" else 1 / row[value] for row in found]
            accuracy, error = [row["accuracy"] for row in found], [row["error"] for row in found]
            axis.errorbar(x, accuracy, error, fmt="o-", color=f"C{number}", label=name, markersize=4, capsize=2)
    for axis, label in zip(axes, ("patches a block, mean", "time, dense = 1"), strict=True):
        dense = measured[1]["accuracy"]
        axis.axhline(dense, color="#888888", linestyle=":")
        axis.set(xlabel=label, ylabel="test accuracy")
    axes[0].legend(fontsize=8)
    write_figure(figure, file)


def _print(measured: list[dict]) -> None:
    table = Table(title="Fashion-MNIST, 10 x 10 patches, 6 blocks")
    for column in ("", "keep", "patches a block", "MFLOPs", "speed", "accuracy"):
        table.add_column(column)
    for row in measured:
        keep = "" if row["keep"] is None else f"{row['keep']:.0%}"
        accuracy = f"{row['accuracy']:.4f} ± {row['error']:.4f}"
        cells = f"{row['patches']:.0f}", f"{row['mflops']:.0f}", f"{row['speed']:.2f}x", accuracy
        table.add_row(row["name"], keep, *cells)
    Console(width=120).print(table)
