"""Selection on the second testbed: training, and how well kept tokens match what is opaque."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

import shiva_ext
from shiva_ext.training.config import TrainConfig
from shiva_ext.training.display import make_display
from shiva_ext.training.trainer import Batch

from .emoji import TextEncoder, batch_source, compose, load_pictures, token_importance
from .flow_training import default_device, flow_matching_batch
from .model import ASSETS
from .train_shiva import PROMPT_ARGUMENTS, TESTBED_CONFIG, make_trainer

CONFIG = replace(TESTBED_CONFIG, batch_size=32, micro_batches=2, joint_steps=3000, adapter_rank=16)


# What ships with the package.
DENSE, ARTEFACT = ASSETS / "emoji_dense", ASSETS / "emoji60"


def load_dense(folder: str | os.PathLike = DENSE, dtype: torch.dtype = torch.float32) -> SD3Transformer2DModel:
    """The dense model that :func:`shiva_ext.testbed.emoji.train` wrote; by default the one that ships."""
    path = Path(folder) / "transformer"
    if not path.is_dir():
        raise FileNotFoundError(f"shiva_ext: there is no model in {path}; train one with 'shiva train emoji'")
    return SD3Transformer2DModel.from_pretrained(path, torch_dtype=dtype).eval().requires_grad_(False)


def train(config: TrainConfig, out: str | os.PathLike, dense_model: str | os.PathLike, resume: bool = False) -> Path:
    """Train router, policy and adapters for the dense model and write the artefact to ``out``.

    On a GPU if there is one, and if this build has the ops for it. With another ``config.method`` what it trains.
    """
    device = default_device(ops=True)
    transformer = load_dense(dense_model).to(device)
    source = batch_source(config.prompt_dropout, device)
    empty = dict(zip(PROMPT_ARGUMENTS, TextEncoder().encode([""]), strict=True))

    def next_batch(count: int, generator: torch.Generator) -> Batch:
        images, *prompts = source(count, generator)
        return Batch(images, dict(zip(PROMPT_ARGUMENTS, prompts, strict=True)), empty)

    display = make_display(True)
    trainer = make_trainer(transformer, config, next_batch, display)
    try:
        trainer.run(Path(out) / "checkpoints", resume)
        trainer.export(out)
    finally:
        display.close()
        trainer.close()
    return Path(out)


@dataclass(frozen=True)
class Agreement:
    """How kept tokens match important ones, at one noise level and layer.

    Attributes:
        sigma, layer: where.
        ratio: share of tokens kept.
        recall: share of the important tokens that are kept.
        precision: share of the kept tokens that are important.
        chance: precision of a random choice: the share of important tokens.
    """

    sigma: float
    layer: int
    ratio: float
    recall: float
    precision: float
    chance: float


@torch.no_grad()
def agreement(
    transformer: SD3Transformer2DModel,
    source,
    levels: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9),
    images: int = 64,
    seed: int = 1,
) -> list[Agreement]:
    """Recall and precision of a source's kept tokens against the alpha channel, by noise level and layer.

    Args:
        transformer: the dense model.
        source: what :func:`shiva_ext.enable` takes.
        levels: noise levels.
        images: pictures, noised to each level.
        seed: of the pictures and the noise.
    """
    pictures, captions = load_pictures()
    device = transformer.device
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(pictures), (images,), generator=generator)
    pixels, alpha = compose(pictures[drawn], generator)
    important = token_importance(alpha)
    tokens, pooled = TextEncoder().encode([captions[i] for i in drawn])
    found = []
    with shiva_ext.enable(transformer, source, batched_guidance=False) as handle:
        for sigma in levels:
            level = torch.full((images,), sigma)
            noisy, _ = flow_matching_batch(pixels, level, generator)
            handle.record()
            inputs = (t.to(device) for t in (noisy, tokens, pooled, 1000 * level))
            transformer(*inputs, return_dict=False)
            for layer, kept in handle.records[0]["kept"].items():
                found.append(_compare(sigma, layer, kept, important))
    return found


def _compare(sigma: float, layer: int, kept: Tensor, important: Tensor) -> Agreement:
    hits = important.gather(1, kept).sum().item()
    total = important.sum().item()
    return Agreement(
        sigma,
        layer,
        kept.shape[1] / important.shape[1],
        hits / max(total, 1),
        hits / kept.numel(),
        total / important.numel(),
    )


def report(
    dense_model: str | os.PathLike = DENSE, source: str | os.PathLike = ARTEFACT, images: int = 256
) -> list[Agreement]:
    """Print recall and precision of an artefact's kept tokens by noise level (rows) and layer (columns)."""
    from rich.console import Console
    from rich.table import Table

    found = agreement(load_dense(dense_model), source, images=images)
    layers = sorted({each.layer for each in found})
    table = Table(title=f"kept tokens against the object: recall / precision (chance {found[0].chance:.2f})")
    table.add_column("noise level")
    for layer in layers:
        table.add_column(f"layer {layer}", no_wrap=True)
    for sigma in sorted({each.sigma for each in found}):
        row = {each.layer: each for each in found if each.sigma == sigma}
        cells = (f"{row[i].recall:.2f} / {row[i].precision:.2f}" if i in row else "dense" for i in layers)
        table.add_row(f"{sigma:.1f}", *cells)
    Console(width=100).print(table)
    ratio, recall, precision = (
        sum(getattr(x, n) for x in found) / len(found) for n in ("ratio", "recall", "precision")
    )
    print(f"mean: recall {recall:.2f}, precision {precision:.2f}; random tokens: {ratio:.2f}, {found[0].chance:.2f}")
    return found
