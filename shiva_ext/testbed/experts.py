"""The first testbed's model with experts (``shiva train experts``), and its control, the dense one trained on."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from .. import moe
from ..files import write_text
from ..training.averaged import train_averaged
from .data import Batches, load_split
from .flow_training import DenseConfig, flow_matching_batch
from .model import NULL_PROMPT, load_model, save_model, save_prompts

EXPERTS_DIR, CONTROL_DIR = "build/moe/experts", "build/moe/control"


@dataclass
class ExpertsConfig(DenseConfig):
    """Settings of both trainings; the experts' are not looked at by the control.

    Attributes:
        num_experts, top_k, balance_weight: of :class:`~shiva_ext.moe.MoEConfig`. An expert takes ``1 / top_k`` of the
            dense MLP's hidden units, so that a token's compute stays what it was.
    """

    steps: int = 1000
    lr: float = 3e-4
    warmup: int = 100
    num_experts: int = 8
    top_k: int = 2
    balance_weight: float = 0.005


def train(
    config: ExpertsConfig,
    out: str | os.PathLike,
    dense_model: str | os.PathLike | None = None,
    data_dir: str | None = None,
    control: bool = False,
) -> None:
    """Train from the dense model's weights, both with the same pictures and noise; goes on from ``out/checkpoints``.

    Writes ``out/transformer`` (by :func:`shiva_ext.moe.save`, or diffusers' way for the control),
    ``out/prompts.safetensors`` and ``out/training.json``: settings, seconds, the curve of the flow-matching loss alone.

    Args:
        config: see :class:`ExpertsConfig`.
        out: folder to write.
        dense_model: where to start; by default the model that ships.
        data_dir: of Fashion-MNIST.
        control: leave the MLPs dense.
    """
    out = Path(out)
    transformer, prompts = load_model(dense_model)
    if not control:
        hidden = transformer.transformer_blocks[0].ff.net[-1].in_features
        shape = dict(num_experts=config.num_experts, top_k=config.top_k, expert_width=hidden // config.top_k)
        moe.upcycle(transformer, moe.MoEConfig(balance_weight=config.balance_weight, **shape), seed=config.seed)
    model = torch.nn.ModuleDict({"transformer": transformer, "prompts": prompts}).requires_grad_(True).train()
    images, labels = load_split("train", data_dir)
    out.mkdir(parents=True, exist_ok=True)

    def loss(generator: torch.Generator):
        sigma = torch.sigmoid(torch.randn(config.batch_size, generator=generator))
        pixels, classes = Batches(images, labels, config.batch_size, generator).next()
        classes[torch.rand(len(classes), generator=generator) < config.prompt_dropout] = NULL_PROMPT
        noisy, target = flow_matching_batch(pixels, sigma, generator)

        def error():
            with torch.autocast("cpu", torch.bfloat16):
                velocity = transformer(noisy, *prompts(classes), sigma * 1000, return_dict=False)[0]
            return F.mse_loss(velocity.float(), target)

        if control:
            return error()
        with moe.record_routing(transformer) as routing:
            plain = error()
        return plain + routing.balance_loss(), plain

    found = train_averaged(model, loss, config.steps, config, out / "checkpoints", "experts")  # whose name is a seed
    average = found.model.bfloat16()
    if control:
        save_model(out, average["transformer"], average["prompts"])
    else:
        moe.save(average["transformer"], out / "transformer")
        save_prompts(out, average["prompts"])
    record = dict(config=asdict(config), control=control, seconds=round(found.seconds), loss=found.curve)
    write_text(out / "training.json", json.dumps(record))
