"""Train the testbed's dense model on Fashion-MNIST."""

import os
from pathlib import Path

import torch

from .data import Batches, load_split
from .flow_training import DenseConfig, default_device, flow_matching_batch, train_flow
from .model import NULL_PROMPT, PromptTable, build_transformer, save_model

__all__ = ["DenseConfig", "flow_matching_batch", "train"]


def train(config: DenseConfig, out: str | os.PathLike, data_dir: str | None = None) -> None:
    """Train and write the model, its settings and loss curve into ``out``. Resumes from ``out/checkpoints``."""
    torch.manual_seed(config.seed)
    images, labels = load_split("train", data_dir)
    device = default_device()
    model = torch.nn.ModuleDict({"transformer": build_transformer(), "prompts": PromptTable()}).to(device)

    def next_batch(model, count, generator):
        pixels, classes = Batches(images, labels, count, generator).next()
        classes[torch.rand(count, generator=generator) < config.prompt_dropout] = NULL_PROMPT
        return pixels.to(device), *model["prompts"](classes.to(device))

    average = train_flow(model, next_batch, config, Path(out)).to(torch.bfloat16)
    save_model(out, average["transformer"], average["prompts"])
