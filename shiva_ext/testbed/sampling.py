"""Generate testbed images: flow matching with batched guidance, as StableDiffusion3Pipeline does it."""

from collections.abc import Callable

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from .data import CLASSES, IMAGE_SIZE
from .model import NULL_PROMPT

GUIDANCE = 2.0
SOLVERS = EULER, ADAMS = "euler", "adams"
STEPS = 20
BATCH_SIZE = 20  # times two with guidance; larger batches fall out of the processor's cache and run no faster


def schedule(steps: int) -> torch.Tensor:
    """Noise levels of ``FlowMatchEulerDiscreteScheduler`` with shift 1: ``steps`` even ones from 1 to 0.001, then 0.

    Returns:
        sigmas, float32 [steps + 1]; the timestep of a step is 1000 times its sigma.

    Raises:
        ValueError: steps is not positive.
    """
    if steps < 1:
        raise ValueError(f"schedule: steps must be at least 1, got {steps}")
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    return scheduler.sigmas


def make_noise(count: int, seed: int, shape: tuple[int, ...] = (1, IMAGE_SIZE, IMAGE_SIZE)) -> torch.Tensor:
    """Noise to start from, float32 [count, *shape]: the same for every method; a smaller count is a prefix."""
    generator = torch.Generator().manual_seed(seed)
    # One draw an image: a single draw of all would order its numbers by their total count.
    noise = torch.empty(count, *shape)
    for image in noise:
        torch.randn(image.shape, generator=generator, out=image)
    return noise


def balanced_labels(count: int) -> torch.Tensor:
    """Classes 0, 1, ..., 9, 0, 1, ... int64 [count]: as many of each in every ten."""
    return torch.arange(count) % len(CLASSES)


@torch.no_grad()
def generate(
    transformer: nn.Module,
    prompts: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    labels: torch.Tensor,
    noise: torch.Tensor,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    batch_size: int = BATCH_SIZE,
    on_step: Callable[[int, float, torch.Tensor], None] | None = None,
    null_prompt: int = NULL_PROMPT,
    solver: str = EULER,
) -> torch.Tensor:
    """Generate one image from each noise.

    The transformer sees [empty prompt, prompt] stacked along the batch, or the prompt alone if ``guidance`` <= 1. The
    state between steps is float32 whatever the weights' dtype. To run in bfloat16 load the model so, or use autocast.

    Args:
        transformer: ``SD3Transformer2DModel`` of the testbed, with or without a method on it.
        prompts: the model's table of prompts: labels to prompt tokens and pooled prompts.
        labels: int64 [B], classes 0..9, or 10 for the empty prompt.
        noise: float [B, 1, 32, 32], or as the other testbed has it.
        steps: of the solver.
        guidance: classifier-free guidance scale.
        batch_size: images at a time (the transformer's batch is twice that with guidance).
        on_step: called as ``on_step(step, sigma, images)`` after each step of each batch, with the noise level that the
            step started from and the state that it left, [b, 1, 32, 32].
        null_prompt: label of the empty prompt.
        solver: "euler", or "adams" (Adams-Bashforth of the second order: a straight line through this step's velocity
            and the last one's, which costs nothing).

    Returns:
        images, float32 [B, 1, 32, 32], roughly in [-1, 1], not clamped.

    Raises:
        ValueError: labels and noise do not belong together, or there is no such solver.
    """
    if solver not in SOLVERS:
        raise ValueError(f"generate: solver is {solver!r}, wanted one of {', '.join(map(repr, SOLVERS))}")
    if labels.ndim != 1 or noise.ndim != 4 or len(labels) != len(noise):
        raise ValueError(
            f"generate: labels must be [B] and noise [B, C, H, W], got {list(labels.shape)} and {list(noise.shape)}"
        )
    if not len(noise):
        return noise.float()
    sigmas, dtype = schedule(steps), next(transformer.parameters()).dtype
    finished = []
    for part, images in zip(labels.split(batch_size), noise.float().split(batch_size), strict=True):
        guided = guidance > 1
        tokens, pooled = prompts(torch.cat([torch.full_like(part, null_prompt), part]) if guided else part)
        tokens, pooled = tokens.to(dtype), pooled.to(dtype)
        before = None  # velocity and length of the last step
        for step in range(steps):
            batch = torch.cat([images, images]) if guided else images
            timestep = (sigmas[step] * 1000).expand(len(batch))
            velocity = transformer(batch.to(dtype), tokens, pooled, timestep, return_dict=False)[0]
            if guided:
                unprompted, prompted = velocity.chunk(2)
                velocity = unprompted + guidance * (prompted - unprompted)
            length = sigmas[step + 1] - sigmas[step]
            slope = velocity
            if solver == ADAMS and before is not None:
                slope = velocity + length / (2 * before[1]) * (velocity - before[0])
            images, before = images + length * slope, (velocity, length)
            if on_step is not None:
                on_step(step, sigmas[step].item(), images)
        finished.append(images.float())
    return torch.cat(finished)
