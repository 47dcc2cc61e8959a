"""Pictures of a run that is under way: the same noise, denoised by the dense model and by the pruned one."""

import os
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from .objectives import Objective
from .recipes import Recipe


@torch.no_grad()
def sample(
    transformer: nn.Module,
    recipe: Recipe,
    objective: Objective,
    conditions: dict[str, Tensor],
    noise: Tensor,
    steps: int = 20,
) -> Tensor:
    """Denoise noise [B,...] in even steps, without guidance; returns latents [B,...]."""
    latents = noise
    for now, after in pairwise(torch.linspace(1, 0, steps + 1).tolist()):
        sigma = torch.full((len(latents),), now, device=latents.device)
        inputs = recipe.inputs(transformer, latents, objective.timestep(sigma), conditions)
        output = recipe.prediction(transformer(**inputs, return_dict=False)[0], latents)
        latents = objective.step(latents, output.to(latents.dtype), now, after)
    return latents


def save_grid(rows: list[Tensor], path: Path) -> None:
    """Write rows of images [B,3,H,W] in [-1, 1] as one picture; it appears whole or not at all."""
    pixels = ((torch.stack(rows).float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    R, B, C, H, W = pixels.shape
    whole = pixels.permute(0, 3, 1, 4, 2).reshape(R * H, B * W, C)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".unfinished-{os.getpid()}")
    Image.fromarray(whole.numpy()).save(unfinished, format="PNG")
    os.replace(unfinished, path)
