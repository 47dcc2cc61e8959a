"""What a run that is under way would give: scores, kept tokens, and samples of the artefact of this moment."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from shiva_ext.artifact import ShivaArtifact

from .samples import sample
from .sampling import derive_seed
from .stages import adapters_off
from .trainer import ShivaTrainer


class _Listener:
    """A selector whose scores are kept."""

    def __init__(self, selector: ShivaArtifact):
        self.selector, self.seen = selector, {}

    def __getattr__(self, name: str):
        return getattr(self.selector, name)

    def scores(self, layer: int, *args) -> Tensor:
        self.seen[layer] = self.selector.scores(layer, *args)
        return self.seen[layer]


def _autocast(trainer: ShivaTrainer) -> torch.autocast:
    return torch.autocast(trainer.device.type, torch.bfloat16, enabled=trainer.config.precision == "bf16")


@contextmanager
def pruned(trainer: ShivaTrainer) -> Iterator[_Listener]:
    """The model as the artefact of this moment would make it; gives the selector, which keeps its scores.

    Another method has no selector; it runs its blocks as they are.
    """
    state = trainer.state
    if state.method is not None:
        try:
            with _autocast(trainer):
                yield None
        finally:
            state.forget()
        return
    selector = state.selector
    state.selector = _Listener(replace(trainer.artifact, table=trainer.table()))
    try:
        with _autocast(trainer):
            yield state.selector
    finally:
        state.selector, state.recording, state.records = selector, False, []
        state.forget()


@torch.no_grad()
def probe(trainer: ShivaTrainer, levels: tuple[float, ...] = (0.25, 0.5, 0.75), samples: int = 2) -> list[dict]:
    """Scores and kept tokens of a few training samples at these noise levels, as the report shows them."""
    found, device, state = [], trainer.device, trainer.state
    for sigma in levels:
        generator = torch.Generator().manual_seed(derive_seed(trainer.config.seed, "probe"))
        batch = trainer.next_batch(samples, generator)
        noise = torch.randn(batch.latents.shape, generator=generator).to(device)
        sigmas = torch.full((samples,), sigma, device=device)
        noisy = trainer.objective.noisy(batch.latents.to(device), noise, sigmas)
        conditions = {name: value.to(device) for name, value in batch.conditions.items()}
        timestep = trainer.objective.timestep(sigmas)
        inputs = trainer.recipe.inputs(trainer.transformer, noisy, timestep, conditions)
        with pruned(trainer) as listener:
            state.at(sigma, fixed=True)
            state.recording, state.records = True, []
            trainer.transformer(**inputs, return_dict=False)
            kept = state.records[0]["kept"]
        scores = {layer: value.float().cpu() for layer, value in listener.seen.items()}
        height, width = noisy.shape[-2:]
        tokens = next(iter(listener.seen.values())).shape[1] if listener.seen else 0
        patch = math.isqrt(height * width // tokens) if tokens else 0
        grid = (height // patch, width // patch) if patch and height * width == tokens * patch**2 else None
        found.append({"sigma": sigma, "grid": grid, "scores": scores, "kept": kept})
    return found


@torch.no_grad()
def draw(trainer: ShivaTrainer, conditions: dict[str, Tensor], noise: Tensor, steps: int = 20) -> tuple[Tensor, Tensor]:
    """The dense model's and the pruned one's latents from the same noise [B,...]."""
    conditions = {name: value.to(trainer.device) for name, value in conditions.items()}
    noise = noise.to(trainer.device)
    arguments = (trainer.transformer, trainer.recipe, trainer.objective, conditions, noise, steps)
    trainer.state.active = False
    try:
        with adapters_off(trainer.transformer), _autocast(trainer):
            dense = sample(*arguments)
    finally:
        trainer.state.active = True
    with pruned(trainer):
        return dense, sample(*arguments)
