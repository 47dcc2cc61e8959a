"""The report's pictures and printed table."""

import math
import os
from collections.abc import Iterable

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.table import Table

from .data import CLASSES

COLOURS = {"dense": "#444444", "shiva": "#c0392b", "other": "#2d7fb8"}


def to_sheet(images: torch.Tensor, columns: int = 10) -> np.ndarray:
    """Images [B,C,H,W] in [-1, 1] side by side, uint8 [rows * H, columns * W], and colours behind if C is 3; cells left
    over are background."""
    B, C, H, W = images.shape
    rows = -(-B // columns)
    cells = torch.full((rows * columns, C, H, W), -1.0)
    cells[:B] = images.float().clamp(-1, 1)
    sheet = cells.view(rows, columns, C, H, W).permute(0, 3, 1, 4, 2).reshape(rows * H, columns * W, C)
    sheet = sheet[..., 0] if C == 1 else sheet
    return ((sheet + 1) * 127.5).round().to(torch.uint8).numpy()


def kept_share(steps: list[dict[int, torch.Tensor]], B: int, tokens: int, layers: Iterable[int] = ()) -> torch.Tensor:
    """How often each token was kept, over steps and layers: float [B, side, side] in [0, 1].

    Args:
        steps: one dict a call from layer to kept indices int64, [B,k], or [2B,k] of both halves of guidance, of which
            the second (prompted) counts.
        B, tokens: images and their tokens.
        layers: that kept all tokens in the steps that do not name them; by default such do not count.
    """
    share, cells, side = torch.zeros(B, tokens), 0, math.isqrt(tokens)
    for kept in steps:
        for index in kept.values():
            share.scatter_add_(1, index[-B:].long(), torch.ones(index[-B:].shape))
        dense = len(set(layers) - set(kept))
        share, cells = share + dense, cells + len(kept) + dense
    return (share / max(cells, 1)).view(B, side, side)


def draw_grid(images: torch.Tensor, file: str | os.PathLike, count: int = 40) -> None:
    """Write the first images as a PNG, ten a line, which is one of each class when the classes are balanced."""
    Image.fromarray(to_sheet(images[:count])).save(file)


def draw_report(lines: list[dict], samples: list[torch.Tensor], file: str | os.PathLike) -> None:
    """Distance against speed-up for every row, beside one sample of each class from the same noise.

    Args:
        lines: the rows of the report.
        samples: for each row images float [10, 1, 32, 32].
        file: PNG to write.
    """
    figure = Figure(figsize=(15, 0.62 * len(lines) + 2), layout="constrained")
    scatter, strips = figure.subplots(1, 2, width_ratios=(1, 1.25))
    # Points are numbered, and the strips name the numbers: names beside the points would cover other points.
    for number, line in enumerate(lines, 1):
        colour = COLOURS.get(line["group"], COLOURS["other"])
        scatter.errorbar(line["speed_up"], line["fid"], line["fid_sd"] or 0, fmt="o", color=colour, capsize=3)
        scatter.annotate(
            number, (line["speed_up"], line["fid"]), xytext=(5, 5), textcoords="offset points", color=colour
        )
    scatter.set_xlabel("speed-up over dense (measured)")
    scatter.set_ylabel("classifier-FID (lower is better)")
    scatter.set_yscale("log")
    scatter.yaxis.set_major_formatter("{x:g}")
    scatter.yaxis.set_minor_formatter("{x:g}")
    scatter.margins(x=0.1, y=0.1)
    scatter.grid(alpha=0.3, which="both")
    sheet = np.concatenate([to_sheet(images) for images in samples])
    strips.imshow(sheet, cmap="gray", vmin=0, vmax=255, aspect="auto")
    edge = samples[0].shape[-1]
    names = [f"{line['name']}   {number}" for number, line in enumerate(lines, 1)]
    strips.set_yticks([edge * (row + 0.5) for row in range(len(lines))], names)
    strips.set_xticks([edge * (column + 0.5) for column in range(len(CLASSES))], CLASSES, rotation=45, ha="right")
    strips.tick_params(length=0)
    strips.set_frame_on(False)
    temporary = f"{file}.tmp"
    figure.savefig(temporary, dpi=110, format="png")
    os.replace(temporary, file)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def print_table(lines: list[dict], console: Console | None = None) -> None:
    """Print the rows of the report."""
    table = Table(title="Testbed: 32 x 32 Fashion-MNIST, the same noise for every row")
    table.add_column("row", no_wrap=True)
    columns = "FID,accuracy,precision,recall,PSNR dB,tokens,foreground kept,GFLOPs,s/image,speed-up"
    for column in columns.split(","):
        table.add_column(column, justify="right")
    for line in lines:
        spread = "" if line["fid_sd"] is None else f" ± {line['fid_sd']:.2g}"
        table.add_row(
            f"{line['name']} ({line['steps']} steps)",
            f"{line['fid']:.3g}{spread}",
            _number(line["accuracy"], ".1%"),
            _number(line["precision"], ".3f"),
            _number(line["recall"], ".3f"),
            _number(line["psnr"], ".2f"),
            _number(line["kept_share"], ".0%"),
            _number(line["foreground_recall"], ".1%"),
            _number(line["gflops"], ".1f"),
            _number(line["seconds"], ".3f"),
            _number(line["speed_up"], ".2f") + "×",
        )
    (console or Console(width=150)).print(table)
