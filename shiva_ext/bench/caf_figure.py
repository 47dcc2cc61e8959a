"""The picture of ``shiva bench caf``."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from ..files import write_figure
from ..testbed.figures import to_sheet

_STYLES = {"CAF": ("#c0392b", "*-"), "rectified flow": ("#2d7fb8", "o-"), "dense": ("#444444", "s-")}


def draw(rows: list[dict], samples: dict[str, Tensor], file: Path) -> None:
    """FID against evaluations of a network for each method, beside samples of the same noise.

    Args:
        rows: each with ``method``, ``evaluations``, ``fid`` and ``fid_error``; a method without a style of its own is a
            horizontal line.
        samples: images float [10, 1, 32, 32] in [-1, 1], by name.
        file: PNG to write.
    """
    figure = Figure(figsize=(14, 0.4 * len(samples) + 2), layout="constrained")
    plot, strips = figure.subplots(1, 2, width_ratios=(1, 1))
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        evaluations, fid = [row["evaluations"] for row in own], [row["fid"] for row in own]
        if method in _STYLES:
            colour, form = _STYLES[method]
            errors = [row["fid_error"] for row in own]
            plot.errorbar(evaluations, fid, errors, fmt=form, color=colour, capsize=3, label=method)
        else:
            plot.axhline(fid[0], color="#888888", linestyle=":", label=f"{method}, {evaluations[0]} evaluations")
    plot.set_xlabel("evaluations of a network a picture")
    plot.set_ylabel("classifier-FID (lower is better)")
    plot.set_yscale("log")
    plot.grid(alpha=0.3, which="both")
    plot.legend()
    sheet = np.concatenate([to_sheet(images) for images in samples.values()])
    strips.imshow(sheet, cmap="gray", vmin=0, vmax=255, aspect="auto")
    edge = next(iter(samples.values())).shape[-1]
    strips.set_yticks([edge * (row + 0.5) for row in range(len(samples))], list(samples))
    strips.set_xticks([])
    strips.tick_params(length=0)
    strips.set_frame_on(False)
    write_figure(figure, file)
