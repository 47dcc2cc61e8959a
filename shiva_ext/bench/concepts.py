"""Bits a byte and time of small language models with and without concepts (``shiva bench concepts``)."""

import os
import statistics
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..files import write_figure
from ..testbed import book
from .pareto import write_content

NAMES = {
    "none": "without concepts",
    "r2": "R = 2",
    "r1.5": "R = 1.5",
    "r2_fixed": "R = 2, fixed chunks",
    "r1.5_fixed": "R = 1.5, fixed chunks",
    "r2_not_joint": "R = 2, not decoded jointly",
    "r1.5_not_joint": "R = 1.5, not decoded jointly",
}


def run(
    folder: str | os.PathLike = book.CONCEPTS_DIR,
    windows: int = 400,
    repeats: int = 15,
    text: str | os.PathLike | None = None,
    out: str | os.PathLike = "results",
) -> dict:
    """Measure every variant on the book's last pages; write ``concepts.json`` and ``concepts.png`` into ``out``.

    Times are of a forward pass (and of a training step) in bfloat16 autocast, each beside the model without concepts,
    medians.

    Args:
        folder: of 'shiva train concepts'.
        windows: of the held-out text.
        repeats: timed pairs a variant.
        text: what was trained on.
        out: folder of the results.

    Raises:
        FileNotFoundError: a variant is not there.
    """
    folder = Path(folder)
    missing = [name for name in NAMES if not (folder / name / "training.json").is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} has no {', '.join(missing)}; run 'shiva train concepts --out {folder}'")
    held_out = book.load_book(text)[1]
    plain, config = book.load(folder / "none")
    plain_bits, _ = book.bits_per_byte(plain, held_out, config.length, windows, config.batch_size)
    starts = torch.linspace(0, len(held_out) - config.length - 1, config.batch_size).long()
    batch = book.windows(held_out, config.length, starts)
    measured = []
    for key, name in NAMES.items():
        model, _ = book.load(folder / key)
        bits, ratio = book.bits_per_byte(model, held_out, config.length, windows, config.batch_size)
        apart = [mine - other for mine, other in zip(bits, plain_bits, strict=True)]
        read = [(_forward(plain, batch), _forward(model, batch)) for _ in range(repeats)]
        step = [(_step(plain, batch), _step(model, batch)) for _ in range(repeats)]
        measured.append(
            dict(
                name=name,
                bits=statistics.fmean(bits),
                apart=statistics.fmean(apart),
                error=1.96 * statistics.stdev(apart) / len(apart) ** 0.5,
                tokens_a_concept=ratio,
                read_speed=statistics.median(a / b for a, b in read),
                step_speed=statistics.median(a / b for a, b in step),
            )
        )
    content = dict(command=f"shiva bench concepts --windows {windows} --repeats {repeats}", rows=measured)
    file = Path(out) / "concepts.json"
    write_content(file, content)
    _draw(measured, file.with_suffix(".png"))
    _print(measured)
    return content


@torch.no_grad()
def _forward(model: nn.Module, batch: Tensor) -> float:
    begun = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        model(batch[:, :-1])
    return time.perf_counter() - begun


def _step(model: nn.Module, batch: Tensor) -> float:
    """Forward and backward, as in training but with the boundaries of eval mode."""
    model.requires_grad_(True)
    begun = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model.loss(batch)
    loss.backward()
    spent = time.perf_counter() - begun
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    return spent


def _draw(measured: list[dict], file: Path) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for number, row in enumerate(measured):
        x = 1 / row["read_speed"]
        axis.errorbar(x, row["bits"], row["error"], fmt="o", color=f"C{number}", label=row["name"], capsize=3)
    axis.set(xlabel="time to read, without concepts = 1", ylabel="bits a byte, held-out pages")
    axis.legend(fontsize=8)
    write_figure(figure, file)


def _print(measured: list[dict]) -> None:
    table = Table(title="a book's last pages, byte by byte")
    for column in ("", "tokens a concept", "bits a byte", "beside none", "reading", "training step"):
        table.add_column(column)
    for row in measured:
        apart = f"{row['apart']:+.4f} ± {row['error']:.4f}"
        speeds = f"{row['read_speed']:.2f}x", f"{row['step_speed']:.2f}x"
        table.add_row(row["name"], f"{row['tokens_a_concept']:.2f}", f"{row['bits']:.4f}", apart, *speeds)
    Console(width=120).print(table)
