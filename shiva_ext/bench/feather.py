"""FEATHER, FastV and what lies between on a small model that must look at the right place (``shiva bench feather``)."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import shiva_ext

from ..files import write_figure
from ..testbed import quadrants
from ..testbed.data import load_split
from ..vlm import FastVConfig, FeatherConfig
from .pareto import write_content

RATIO = 0.75


@dataclass(frozen=True)
class Row:
    """A way to prune; None for none."""

    name: str
    config: FeatherConfig | FastVConfig | None = None


def rows(layers: int) -> list[Row]:
    """The paper's comparison, at the layers that are as deep in a model of this size as its own of 32."""
    early, late, second = max(1, layers * 3 // 32), max(1, layers // 4), layers // 2
    found = [Row("all tokens")]
    for layer in dict.fromkeys((early, late)):
        one = (layer,)
        found += [
            Row(f"FastV, layer {layer}", FastVConfig(RATIO, layer)),
            Row(f"without RoPE, layer {layer}", FeatherConfig(RATIO, one, stride=0)),
            Row(f"without RoPE, with the grid, layer {layer}", FeatherConfig(RATIO, one)),
        ]
    return [*found, Row(f"FEATHER, layers {late} and {second}", FeatherConfig(layers=(late, second)))]


def heights(model: nn.Module, batches: list[tuple[dict, Tensor]], layer: int, rope: bool) -> float:
    """The mean height at which a quarter of the visual tokens is kept: 0 the top row, 1 the bottom one, .5 no bias."""
    config = FeatherConfig(RATIO, (layer,), stride=0, rope=rope)
    total, count = 0.0, 0
    with shiva_ext.enable(model, config) as handle:
        for asked, _ in batches:
            quadrants.answer(model, asked)
            kept = torch.cat(handle.kept[0])
            total += (kept // quadrants.TOKENS).double().sum().item() / (quadrants.TOKENS - 1)
            count += len(kept)
    return total / count


@torch.no_grad()
def run(
    folder: str | os.PathLike = quadrants.VLM_DIR,
    samples: int = 1000,
    data_dir: str | None = None,
    out: str | os.PathLike = "results",
) -> dict:
    """Measure every row and the position bias by layer; write ``feather.json`` and ``feather.png`` into ``out``.

    Args:
        folder: of 'shiva train vlm'.
        samples: questions about test pictures, the same for all.
        data_dir: of Fashion-MNIST.
        out: folder of the results.

    Raises:
        FileNotFoundError: the model is not there.
    """
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no model; run 'shiva train vlm --out {folder}'")
    model, (images, labels) = quadrants.load(folder), load_split("test", data_dir)
    generator = torch.Generator().manual_seed(0)
    sizes = [min(50, samples - first) for first in range(0, samples, 50)]
    batches = [quadrants.questions(images, labels, size, generator) for size in sizes]
    layers = model.config.text_config.num_hidden_layers
    measured = [_measure(model, row, batches) for row in rows(layers)]
    few = batches[:4]
    bias = [
        dict(layer=layer, rope=heights(model, few, layer, True), no_rope=heights(model, few, layer, False))
        for layer in range(1, layers)
    ]
    content = dict(command=f"shiva bench feather --samples {samples}", rows=measured, height=bias)
    file = Path(out) / "feather.json"
    write_content(file, content)
    _draw(measured, bias, file.with_suffix(".png"))
    _print(measured, bias)
    return content


def _measure(model: nn.Module, row: Row, batches: list[tuple[dict, Tensor]]) -> dict:
    handle = None if row.config is None else shiva_ext.enable(model, row.config)
    right, asked_for, saved = [], [], []
    for asked, wanted in batches:
        right.append(quadrants.answer(model, asked).argmax(dim=1) == wanted)
        asked_for.append(asked["input_ids"][:, -2] - quadrants.FIRST_QUADRANT)
        if handle is not None:
            saved.append(handle.flops_reduction())
    shiva_ext.disable(model)
    right, asked_for = torch.cat(right).double(), torch.cat(asked_for)
    return dict(
        name=row.name,
        accuracy=right.mean().item(),
        error=1.96 * right.std().item() / len(right) ** 0.5,
        by_quadrant=[right[asked_for == q].mean().item() for q in range(4)],
        operations_saved=sum(saved) / len(saved) if saved else 0.0,
    )


def _draw(measured: list[dict], bias: list[dict], file: Path) -> None:
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    layer = [each["layer"] for each in bias]
    left.plot(layer, [each["rope"] for each in bias], "o-", color="#c0392b", label="score with RoPE (FastV)")
    left.plot(layer, [each["no_rope"] for each in bias], "s-", color="#2d7fb8", label="score without RoPE (FEATHER)")
    left.axhline(0.5, color="#888888", linestyle=":")
    left.set(xlabel="pruned before layer", ylabel="mean height of the kept tokens\n0 top, 1 bottom", ylim=(0, 1))
    left.legend(fontsize=8)
    names = [each["name"] for each in measured]
    for quadrant, name in enumerate(quadrants.QUADRANTS):
        offset = (quadrant - 1.5) * 0.2
        places = [place + offset for place in range(len(names))]
        right.barh(places, [each["by_quadrant"][quadrant] for each in measured], height=0.18, label=name)
    right.set_yticks(range(len(names)), [f"{e['name']} (-{e['operations_saved']:.0%})" for e in measured], fontsize=8)
    right.invert_yaxis()
    right.set(xlabel="accuracy by quadrant", xlim=(0, 1))
    right.legend(fontsize=8)
    write_figure(figure, file)


def _print(measured: list[dict], bias: list[dict]) -> None:
    table = Table(title="one of four pictures asked for")
    for column in ("", "operations saved", "accuracy", *quadrants.QUADRANTS):
        table.add_column(column)
    for row in measured:
        by_quadrant = [f"{each:.2f}" for each in row["by_quadrant"]]
        accuracy = f"{row['accuracy']:.3f} ± {row['error']:.3f}"
        table.add_row(row["name"], f"{row['operations_saved']:.0%}", accuracy, *by_quadrant)
    console = Console(width=120)
    console.print(table)
    for each in bias:
        console.print(
            f"before layer {each['layer']}: mean height {each['rope']:.3f} with RoPE, {each['no_rope']:.3f} without"
        )
