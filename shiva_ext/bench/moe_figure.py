"""The picture of ``shiva bench moe``."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from ..files import write_figure


def draw(training: dict[str, dict], load: Tensor, position: Tensor, file: Path) -> None:
    """Loss curves, each expert's load over the steps, and the expert that each position asks most, by layer.

    Args:
        training: by name, each with ``loss``, [step, loss] pairs.
        load: [steps, layers, n], shares.
        position: [layers, N, n], shares; N a square.
        file: PNG to write.
    """
    steps, layers, n = load.shape
    figure = Figure(figsize=(3.2 + 1.7 * layers, 5.2), layout="constrained")
    curves, maps = figure.subfigures(1, 2, width_ratios=(3.2, 1.7 * layers))
    plot = curves.subplots()
    for name, record in training.items():
        plot.plot(*zip(*record["loss"], strict=True), label=name)
    plot.set_xlabel("step")
    plot.set_ylabel("flow-matching loss, mean of 50 steps")
    plot.grid(alpha=0.3)
    plot.legend()
    grid = maps.subplots(2, layers, squeeze=False)
    side = round(position.shape[1] ** 0.5)
    for layer in range(layers):
        above, below = grid[0, layer], grid[1, layer]
        shares = above.imshow(load[:, layer].T * n, aspect="auto", vmin=0, vmax=2, cmap="RdBu_r")
        above.set_title(f"layer {layer}", fontsize=9)
        above.set_xlabel("step", fontsize=8)
        best = position[layer].argmax(dim=-1).view(side, side)
        experts = below.imshow(best, cmap="tab20", vmin=-0.5, vmax=n - 0.5)
        for axes in (above, below):
            axes.tick_params(labelsize=7)
        below.set_xticks([])
        below.set_yticks([])
    grid[0, 0].set_ylabel("expert")
    grid[1, 0].set_ylabel("position in the picture")
    maps.colorbar(shares, ax=grid[0].tolist(), label="load, 1 is even")
    maps.colorbar(experts, ax=grid[1].tolist(), label="expert asked most", ticks=np.arange(n))
    write_figure(figure, file)
