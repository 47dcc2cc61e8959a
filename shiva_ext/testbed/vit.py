"""A small vision transformer on Fashion-MNIST, and the ways to prune its patches (``shiva train vit``)."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

import shiva_ext

from ..files import write_text
from ..training.averaged import train_averaged
from ..vit import DynamicViTConfig, PatchConfig, PatchPruner, RandomPatchConfig, ShivaViTConfig, TNTConfig
from ..vit import load as load_pruner
from .data import CLASSES, load_split, to_float

VIT_DIR = "build/vit"
SIDE, PATCH = 30, 3
DENSE, DENSE_ON = "dense", "dense_on"
KEEP, AFTER, PASSED_BY, SITES = 0.5, (1,), (2, 3, 4), 3
METHODS: dict[str, PatchConfig] = {
    "tnt": TNTConfig(KEEP, AFTER, sites=SITES),
    "tnt_rescaled": TNTConfig(KEEP, AFTER, sites=SITES, rescaled=True),
    "dynamicvit": DynamicViTConfig(KEEP, AFTER),
    "counterfactual": ShivaViTConfig(KEEP, PASSED_BY),
    "residual": ShivaViTConfig(KEEP, PASSED_BY, estimator="residual"),
    "random": RandomPatchConfig(KEEP, AFTER),
    "random_pass_by": RandomPatchConfig(KEEP, PASSED_BY, pass_by=True),
}


@dataclass
class ViTTrainConfig:
    """Settings of the training.

    Attributes:
        steps, prune_steps: of the dense model from nothing, and of every way to prune from there.
        batch_size: pictures a step.
        lr, prune_lr: of AdamW; the last ``decay`` share of a run falls linearly to 0.
        warmup: steps of linear warm-up.
        depth, width: of the transformer; heads of 64 channels.
        ema: decay of the weights' moving average, which is what is saved.
        checkpoint_every: steps between two checkpoints.
        seed: of the weights and the pictures.
    """

    steps: int = 1500
    prune_steps: int = 400
    batch_size: int = 64
    lr: float = 1e-3
    prune_lr: float = 3e-4
    warmup: int = 50
    decay: float = 0.5
    depth: int = 6
    width: int = 128
    ema: float = 0.99
    checkpoint_every: int = 200
    seed: int = 0


def build(config: ViTTrainConfig) -> ViTForImageClassification:
    """A ViT with fresh weights, 100 patches of 3 x 3 pixels."""
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=config.width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.width // 64,
            intermediate_size=4 * config.width,
            image_size=SIDE,
            patch_size=PATCH,
            num_channels=1,
            num_labels=len(CLASSES),
        )
    )


def pixels(images: Tensor) -> Tensor:
    """uint8 [B,1,32,32] -> float [B,1,30,30] in [-1, 1]."""
    edge = (images.shape[-1] - SIDE) // 2
    return to_float(images[..., edge : edge + SIDE, edge : edge + SIDE])


def _loss(modules: nn.ModuleDict, images: Tensor, labels: Tensor, batch_size: int) -> Callable:
    def loss(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(images), (batch_size,), generator=generator)
        batch = pixels(images[chosen])
        flip = torch.rand(batch_size, generator=generator) < 0.5
        batch = torch.where(flip.view(-1, 1, 1, 1), batch.flip(-1), batch)
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))  # of Gumbel draws and noise
        vit, asked = modules["vit"], 0.0
        handle = shiva_ext.enable(vit, modules["pruner"]) if "pruner" in modules else None
        try:
            with torch.autocast("cpu", torch.bfloat16):
                logits = vit(batch).logits
            if handle is not None:
                asked = handle.loss()
        finally:
            shiva_ext.disable(vit)
        error = F.cross_entropy(logits.float(), labels[chosen])
        return error + asked, error

    return loss


def _run(modules: nn.ModuleDict, config: ViTTrainConfig, steps: int, folder: Path, data) -> None:
    estimator = getattr(modules["pruner"], "estimator", None) if "pruner" in modules else None

    def advance(step: int) -> None:
        if estimator is not None:
            estimator.progress = step / steps

    loss = _loss(modules.train(), *data, config.batch_size)
    name = f"vit, {folder.name}"
    found = train_averaged(modules, loss, steps, config, folder / "checkpoints", name, before_step=advance)
    found.model["vit"].save_pretrained(folder)
    if "pruner" in modules:
        found.model["pruner"].save(folder)
    write_text(
        folder / "training.json",
        json.dumps(dict(config=asdict(config), seconds=round(found.seconds), loss=found.curve)),
    )


def train(
    config: ViTTrainConfig,
    out: str | os.PathLike = VIT_DIR,
    methods: list[str] | None = None,
    data_dir: str | None = None,
) -> None:
    """Train the dense model, then from it every way to prune and the dense model further, each in a folder of ``out``.

    What is done already is left alone, and what was begun goes on.

    Args:
        config: the settings.
        out: folder to write.
        methods: some of METHODS' names; by default all.
        data_dir: of Fashion-MNIST.

    Raises:
        ValueError: an unknown method.
    """
    wanted = [DENSE_ON, *METHODS] if methods is None else methods
    if unknown := [name for name in wanted if name not in METHODS and name != DENSE_ON]:
        raise ValueError(f"shiva train vit: unknown {', '.join(unknown)}; there are {', '.join([DENSE_ON, *METHODS])}")
    out, data = Path(out), load_split("train", data_dir)
    if not (out / DENSE / "training.json").is_file():
        torch.manual_seed(config.seed)
        _run(nn.ModuleDict({"vit": build(config)}), config, config.steps, out / DENSE, data)
    shorter = replace(config, lr=config.prune_lr)
    for name in wanted:
        if (out / name / "training.json").is_file():
            continue
        torch.manual_seed(config.seed)
        modules = nn.ModuleDict({"vit": ViTForImageClassification.from_pretrained(out / DENSE)})
        if name in METHODS:
            modules["pruner"] = PatchPruner(METHODS[name], config.width)
        _run(modules, shorter, config.prune_steps, out / name, data)


def load(folder: str | os.PathLike, **changes) -> tuple[ViTForImageClassification, PatchPruner | None]:
    """A model that :func:`train` wrote, in eval mode, and its pruner, if it has one, with some settings changed."""
    vit = ViTForImageClassification.from_pretrained(folder).eval().requires_grad_(False)
    pruner = None
    if (Path(folder) / "patches.json").is_file():
        pruner = load_pruner(folder, **changes).eval().requires_grad_(False)
    return vit, pruner
