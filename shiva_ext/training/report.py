"""One page about a training run: its curves, what it learned to keep, and where. It needs no other file."""

import base64
import html
import io
import json
import os
from dataclasses import asdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from ..artifact import ShivaArtifact
from ..method_artifact import MethodArtifact

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
img{max-width:100%}table{border-collapse:collapse;font-size:14px}td,th{padding:.15rem .7rem;text-align:left;
border-bottom:1px solid #ddd}h2{margin-top:2.5rem}@media print{h2{break-after:avoid}img{break-inside:avoid}}"""


def _picture(figure, alt: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def _curves(history: list[dict]) -> str:
    names = [n for n in dict.fromkeys(k for e in history for k in e) if n not in ("stage", "step", "seconds")]
    figure, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 2.6), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        offset = 0
        for stage in dict.fromkeys(e["stage"] for e in history):
            entries = [e for e in history if e["stage"] == stage]
            points = [(offset + e["step"], e[name]) for e in entries if name in e]
            axis.plot(*zip(*points, strict=True), label=stage) if points else None
            offset += entries[-1]["step"]
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step")
        axis.legend(fontsize=7)
    figure.tight_layout()
    return _picture(figure, "losses over the steps of the three stages")


def _ratio_map(artifact: ShivaArtifact) -> str:
    ratios = torch.tensor([artifact.table.ratios(sigma) for sigma in artifact.table.sigmas])
    figure, axis = plt.subplots(figsize=(7, 3.2))
    image = axis.imshow(ratios.T, aspect="auto", origin="lower", cmap="viridis", vmin=0, vmax=1)
    ticks = range(0, len(artifact.table.sigmas), max(1, len(artifact.table.sigmas) // 8))
    axis.set_xticks(ticks, [f"{float(artifact.table.sigmas[i]):.2f}" for i in ticks])
    axis.set_xlabel("noise level (1 is pure noise)")
    axis.set_ylabel("layer")
    figure.colorbar(image, label="share of tokens kept")
    return _picture(figure, "share of tokens kept by noise level and layer")


def _histograms(probes: list[dict]) -> str:
    layers = sorted(probes[0]["scores"])
    shown = layers[:: max(1, len(layers) // 6)]
    figure, axes = plt.subplots(1, len(shown), figsize=(2.6 * len(shown), 2.3), squeeze=False)
    for axis, layer in zip(axes[0], shown, strict=True):
        for probe in probes:
            if layer in probe["scores"]:
                axis.hist(probe["scores"][layer].flatten(), bins=40, alpha=0.5, label=f"level {probe['sigma']:.2f}")
        axis.set_title(f"layer {layer}", fontsize=10)
        axis.set_yticks([])
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    return _picture(figure, "histograms of the router's scores")


def _kept_maps(probes: list[dict]) -> str:
    layers = sorted(probes[0]["kept"])
    height, width = probes[0]["grid"]
    shown = layers[:: max(1, len(layers) // 6)]
    figure, axes = plt.subplots(len(probes), len(shown), figsize=(1.5 * len(shown), 1.6 * len(probes)), squeeze=False)
    for row, probe in zip(axes, probes, strict=True):
        for axis, layer in zip(row, shown, strict=True):
            mask = torch.zeros(height * width)
            if layer in probe["kept"]:
                mask[probe["kept"][layer][0]] = 1
            else:
                mask[:] = 1  # dense at this level
            axis.imshow(mask.view(height, width), cmap="gray", vmin=0, vmax=1)
            axis.set_title(f"L{layer}, {probe['sigma']:.2f}", fontsize=8)
            axis.axis("off")
    figure.tight_layout()
    return _picture(figure, "kept tokens of one image, by noise level and layer")


def _table(values: dict) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(json.dumps(value))}</td></tr>"
        for name, value in values.items()
    )
    return f"<table>{rows}</table>"


def write_report(
    path: Path, artifact: ShivaArtifact | MethodArtifact, run: dict, probes: list[dict] | None = None
) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        artifact: the result; its metadata holds the history.
        run: what was asked for: model, data, settings.
        probes: for some noise levels ``{"sigma", "grid": (H, W), "scores": {layer: [B,N]}, "kept": {layer: [B,k]}}``.
    """
    history = artifact.metadata.get("history", [])
    parts = ["<h2>What was trained</h2>" + _table({k: v for k, v in run.items() if k != "config"})]
    if isinstance(artifact, MethodArtifact):
        parts.append(f"<h2>{type(artifact.method).__name__}</h2>" + _table(asdict(artifact.method)))
    else:
        mean = f"<p>Mean {artifact.table.mean():.3f}, asked for {run['config']['budget']}.</p>"
        parts.append("<h2>Share of tokens kept</h2>" + mean + _ratio_map(artifact))
    if history:
        parts.append("<h2>Losses</h2>" + _curves(history))
    if probes and probes[0]["scores"]:
        parts.append("<h2>Scores of the router</h2>" + _histograms(probes))
        if probes[0]["grid"] is not None:
            parts.append("<h2>Kept tokens of one image</h2><p>White is kept.</p>" + _kept_maps(probes))
    parts.append("<h2>Settings</h2>" + _table(run["config"]))
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Token selection: training</title>'
        f"<style>{STYLE}</style><h1>Token selection: training</h1>{''.join(parts)}</html>"
    )
    temporary = path.with_suffix(".tmp")
    temporary.write_text(page)
    os.replace(temporary, path)
