"""The demonstration: the same prompts dense and pruned, as one picture and one table."""

import os
import statistics
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import shiva_ext
from shiva_ext.evaluation.metrics import psnr

from .data import CLASSES, IMAGE_SIZE
from .model import ASSETS, PROMPT_TOKENS, build_pipeline, load_model
from .sampling import GUIDANCE

VARIANTS = (("dense", None), ("Shiva 80 %", "shiva80"), ("Shiva 60 %", "shiva60"))
MAP_STEPS = 5
REPEATS = 3
PIXELS_PER_LATENT = 8  # diffusers assumes an eightfold autoencoder where a pipeline has none


def _generate(pipe, prompts, labels: torch.Tensor, steps: int) -> torch.Tensor:
    """Images [B,1,32,32] in [-1, 1] from diffusers' own pipeline; the same noise every time."""
    dtype = pipe.transformer.dtype
    tokens, pooled = prompts(labels)
    no_tokens, no_pooled = prompts(torch.full_like(labels, len(CLASSES)))
    return pipe(
        prompt_embeds=tokens.to(dtype),
        pooled_prompt_embeds=pooled.to(dtype),
        negative_prompt_embeds=no_tokens.to(dtype),
        negative_pooled_prompt_embeds=no_pooled.to(dtype),
        height=IMAGE_SIZE * PIXELS_PER_LATENT,
        width=IMAGE_SIZE * PIXELS_PER_LATENT,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator().manual_seed(i) for i in range(len(labels))],
        output_type="latent",
    ).images.float()


def _picture(images: dict[str, torch.Tensor], records: list[dict], layers: int, path: Path) -> None:
    """Columns dense | 80 % | 60 % for each prompt, and the kept tokens of one prompt by layer and step."""
    count = len(images["dense"])
    figure = Figure(figsize=(13, 0.62 * count + 1), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.5))
    axes = left.subplots(count, len(images), squeeze=False)
    for column, (name, batch) in enumerate(images.items()):
        axes[0][column].set_title(name, fontsize=9)
        for row in range(count):
            axes[row][column].imshow(batch[row, 0], cmap="gray", vmin=-1, vmax=1)
    for row in range(count):
        axes[row][0].set_ylabel(CLASSES[row], fontsize=7, rotation=0, ha="right", va="center")
    shown = range(0, len(records), max(1, -(-len(records) // MAP_STEPS)))
    right.suptitle(f"Shiva 60 %, '{CLASSES[-1]}': tokens kept (bright) by layer and step", fontsize=9)
    maps = right.subplots(len(shown), layers - 1, squeeze=False)
    name = list(images)[-1]
    picture = images[name][count - 1, 0].clamp(-1, 1) / 2 + 0.5
    for row, step in enumerate(shown):
        for layer in range(1, layers):
            kept = records[step]["kept"].get(layer)
            mask = torch.ones(256) if kept is None else torch.zeros(256).scatter_(0, kept[count - 1], 1.0)
            tokens = mask.view(16, 16).repeat_interleave(2, 0).repeat_interleave(2, 1)
            shade = torch.stack([0.15 + 0.85 * picture * tokens, 0.15 + 0.85 * picture * tokens, 0.2 + 0.3 * tokens])
            axis = maps[row][layer - 1]
            axis.imshow(torch.where(tokens.bool(), shade + 0.1, shade).clamp(0, 1).permute(1, 2, 0))
            share = mask.mean().item()
            axis.set_xlabel(f"{share:.0%}", fontsize=6, labelpad=1)
            if row == 0:
                axis.set_title(f"layer {layer}", fontsize=8)
            if layer == 1:
                axis.set_ylabel(f"step {step}", fontsize=8)
    for axis in (*axes.flat, *maps.flat):
        axis.set_xticks([])
        axis.set_yticks([])
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    os.replace(temporary, path)


def run(out: str | os.PathLike = "build/demo", steps: int = 20) -> dict[str, dict[str, float]]:
    """Generate one image a class dense and with both artefacts; write ``demo.png``, print and return the table."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    labels = torch.arange(len(CLASSES))
    images, rows, pipes, summaries, records = {}, {}, {}, {}, []
    # bfloat16 pays where the processor multiplies in it.
    dtype = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    for name, artefact in VARIANTS:
        transformer, prompts = load_model(dtype=dtype)
        pipe = pipes[name] = build_pipeline(transformer)
        pipe.set_progress_bar_config(disable=True)
        if artefact is None:
            images[name] = _generate(pipe, prompts, labels, steps)
            continue
        handle = shiva_ext.enable(pipe, ASSETS / artefact).record()
        images[name] = _generate(pipe, prompts, labels, steps)
        records = handle.records
        handle.record(False)
        sigmas = [record["timestep"] / 1000 for record in records]
        summaries[name] = shiva_ext.summary(pipe, steps=sigmas, text_tokens=PROMPT_TOKENS)
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    for _ in tqdm(range(REPEATS), desc="timing, interleaved"):
        for name, pipe in pipes.items():
            started = time.perf_counter()
            _generate(pipe, prompts, labels, steps)
            seconds[name].append(time.perf_counter() - started)
    dense_flops = next(iter(summaries.values())).dense_flops
    for name in pipes:
        summary = summaries.get(name)
        ratios = [dense / mine for dense, mine in zip(seconds["dense"], seconds[name], strict=True)]
        rows[name] = {
            "kept": 1.0 if summary is None else summary.mean_ratio,
            "gflops": (dense_flops if summary is None else sum(summary.flops) / len(summary.flops)) / 1e9,
            "seconds": statistics.median(seconds[name]) / len(labels),
            "speed_up": statistics.median(ratios),
            "psnr": float("inf") if summary is None else psnr(images[name], images["dense"]).mean().item(),
        }
    _picture(images, records, pipes["dense"].transformer.config.num_layers, out / "demo.png")
    table = Table(title=f"{len(labels)} images, {steps} steps, guidance {GUIDANCE:g}, {str(dtype)[6:]}")
    for column in ("model", "tokens kept", "GFLOPs a step", "s an image", "speed-up", "PSNR to dense"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, row in rows.items():
        distance = "-" if row["psnr"] == float("inf") else f"{row['psnr']:.1f} dB"
        table.add_row(
            name,
            f"{row['kept']:.1%}",
            f"{row['gflops']:.3f}",
            f"{row['seconds']:.3f}",
            f"{row['speed_up']:.2f}x",
            distance,
        )
    Console().print(table)
    print(f"picture: {out / 'demo.png'}")
    return rows
