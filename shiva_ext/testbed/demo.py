"""The demonstration: the same prompts dense and pruned, as one picture and one table."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import shiva_ext
from shiva_ext.evaluation.metrics import psnr

from .data import CLASSES, IMAGE_SIZE
from .model import ASSETS, PROMPT_TOKENS, TRANSFORMER_CONFIG, build_pipeline, load_model
from .sampling import GUIDANCE

VARIANTS = (("dense", None), ("Shiva 80 %", ASSETS / "shiva80"), ("Shiva 60 %", ASSETS / "shiva60"))
Prompts = tuple[torch.Tensor, torch.Tensor]  # tokens [B,T,J], pooled [B,P]
MAP_STEPS = 5
PIXELS_PER_LATENT = 8  # diffusers assumes an eightfold autoencoder where a pipeline has none


def generate(pipe, prompted: Prompts, unprompted: Prompts, side: int, steps: int, guidance: float) -> torch.Tensor:
    """Images [B,C,side,side] in [-1, 1] from diffusers' own pipeline; the same noise every time."""
    (tokens, pooled), (no_tokens, no_pooled) = (
        [t.to(pipe.transformer.dtype) for t in p] for p in (prompted, unprompted)
    )
    return pipe(
        prompt_embeds=tokens,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=no_tokens,
        negative_pooled_prompt_embeds=no_pooled,
        height=side * PIXELS_PER_LATENT,
        width=side * PIXELS_PER_LATENT,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(i) for i in range(len(tokens))],
        output_type="latent",
    ).images.float()


def compare(
    load: Callable[[torch.dtype], torch.nn.Module],
    variants: Sequence[tuple[str, str | os.PathLike | None]],
    call: Callable[[object], torch.Tensor],
    text_tokens: int,
    title: str,
    repeats: int = 3,
) -> tuple[dict[str, torch.Tensor], list[dict], dict[str, dict[str, float]]]:
    """Generate with each variant of a model, time them in turns, and print the table.

    Args:
        load: gives the dense transformer in a dtype.
        variants: name and artefact; ("dense", None) comes first.
        call: gives a pipeline's images.
        text_tokens: of a prompt.
        title: of the table.
        repeats: timed calls of each.

    Returns:
        images by variant; what the last variant kept, step by step; the table's rows.
    """
    images, rows, pipes, summaries, records = {}, {}, {}, {}, []
    # bfloat16 pays where the processor multiplies in it.
    dtype = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    for name, artefact in variants:
        pipe = pipes[name] = build_pipeline(load(dtype))
        pipe.set_progress_bar_config(disable=True)
        if artefact is None:
            images[name] = call(pipe)
            continue
        handle = shiva_ext.enable(pipe, artefact).record()
        images[name] = call(pipe)
        records = handle.records
        handle.record(False)
        sigmas = [record["timestep"] / 1000 for record in records]
        summaries[name] = shiva_ext.summary(pipe, steps=sigmas, text_tokens=text_tokens)
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    for _ in tqdm(range(repeats), desc="timing, interleaved"):
        for name, pipe in pipes.items():
            started = time.perf_counter()
            call(pipe)
            seconds[name].append(time.perf_counter() - started)
    dense_flops, count = next(iter(summaries.values())).dense_flops, len(images["dense"])
    for name in pipes:
        summary = summaries.get(name)
        ratios = [dense / mine for dense, mine in zip(seconds["dense"], seconds[name], strict=True)]
        rows[name] = {
            "kept": 1.0 if summary is None else summary.mean_ratio,
            "gflops": (dense_flops if summary is None else sum(summary.flops) / len(summary.flops)) / 1e9,
            "seconds": statistics.median(seconds[name]) / count,
            "speed_up": statistics.median(ratios),
            "psnr": float("inf") if summary is None else psnr(images[name], images["dense"]).mean().item(),
        }
    _print_table(rows, f"{title}, {str(dtype)[6:]}")
    return images, records, rows


def _print_table(rows: dict[str, dict[str, float]], title: str) -> None:
    table = Table(title=title)
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
    _, prompts = load_model()
    prompted, unprompted = prompts(labels), prompts(torch.full_like(labels, len(CLASSES)))
    images, records, rows = compare(
        lambda dtype: load_model(dtype=dtype)[0],
        VARIANTS,
        lambda pipe: generate(pipe, prompted, unprompted, IMAGE_SIZE, steps, GUIDANCE),
        PROMPT_TOKENS,
        f"{len(labels)} images, {steps} steps, guidance {GUIDANCE:g}",
    )
    _picture(images, records, TRANSFORMER_CONFIG["num_layers"], out / "demo.png")
    print(f"picture: {out / 'demo.png'}")
    return rows
