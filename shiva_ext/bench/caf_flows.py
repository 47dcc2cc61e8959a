"""The flows that ``shiva bench caf`` compares, behind one interface. Times are CAF's: t = 0 is noise, t = 1 data."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from ..caf import CAFPipeline, predict, straightness
from ..caf.flow import from_diffusers_velocity

Prompts = Callable[[Tensor], tuple[Tensor, Tensor]]


class Flow(ABC):
    """Labels are int64 [B], samples float32 [B, C, H, W]."""

    @abstractmethod
    def generate(self, labels: Tensor, noise: Tensor, steps: int) -> Tensor:
        """Data of noise."""

    @abstractmethod
    def reconstruct(self, labels: Tensor, data: Tensor, steps: int) -> tuple[Tensor, int]:
        """Data that were inverted and generated again, and the evaluations that it took."""

    @abstractmethod
    def path(self, labels: Tensor, noise: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """x and dx/dt at t = 0, 1 / steps, ..., and the data with the derivative before."""

    @torch.no_grad()
    def straightness(self, labels: Tensor, noise: Tensor, steps: int) -> float:
        """NFSS: the mean over samples and times of :func:`shiva_ext.caf.straightness`."""
        *before, (end, _) = self.path(labels, noise, steps)
        return torch.stack([straightness(noise, end, rate) for _, rate in before]).mean().item()


class VelocityFlow(Flow):
    """Euler steps of even length, t = i / N, along a flow-matching model's velocity.

    Diffusers' own two steps would be of lengths .999 and .001: its noise levels are even from 1 to .001, and then 0.

    Args:
        transformer: puts out noise - data.
        prompts: labels to prompt tokens and pooled prompts.
        guidance: above 1 each step takes two evaluations.
        null_prompt: label of the empty prompt, for guidance.
    """

    def __init__(
        self, transformer: SD3Transformer2DModel, prompts: Prompts, guidance: float = 1.0, null_prompt: int = 0
    ):
        self.transformer, self.prompts = transformer, prompts
        self.guidance, self.null_prompt = guidance, null_prompt

    def _rate(self, labels: Tensor, x: Tensor, t: float) -> Tensor:
        """dx/dt at x."""
        guided = self.guidance > 1
        asked = torch.cat([torch.full_like(labels, self.null_prompt), labels]) if guided else labels
        tokens, pooled = self.prompts(asked)
        batch, time = x.repeat(2 if guided else 1, 1, 1, 1), torch.full((len(asked),), t)
        conditions = dict(encoder_hidden_states=tokens, pooled_projections=pooled)
        velocity = predict(self.transformer, batch, time, conditions, h=1)
        if guided:
            unprompted, prompted = velocity.chunk(2)
            velocity = unprompted + self.guidance * (prompted - unprompted)
        return from_diffusers_velocity(velocity)

    def path(self, labels, noise, steps):
        x = noise
        for i in range(steps):
            rate = self._rate(labels, x, i / steps)
            yield x, rate
            x = x + rate / steps
        yield x, rate

    @torch.no_grad()
    def generate(self, labels, noise, steps):
        *_, (x, _) = self.path(labels, noise, steps)
        return x

    @torch.no_grad()
    def reconstruct(self, labels, data, steps):
        x = data
        for i in range(steps, 0, -1):
            x = x - self._rate(labels, x, i / steps) / steps
        return self.generate(labels, x, steps), 2 * steps * (2 if self.guidance > 1 else 1)


class AccelerationFlow(Flow):
    """CAF's pipeline; the reconstruction takes the velocity that the inversion has estimated."""

    def __init__(self, pipe: CAFPipeline, prompts: Prompts):
        self.pipe, self.prompts = pipe, prompts

    def _given(self, labels: Tensor) -> dict[str, Tensor]:
        return dict(zip(("prompt_embeds", "pooled_prompt_embeds"), self.prompts(labels), strict=True))

    def generate(self, labels, noise, steps, **options):
        given = self._given(labels) | options
        return self.pipe(**given, latents=noise, num_inference_steps=steps, output_type="latent").images

    def reconstruct(self, labels, data, steps):
        found = self.pipe.invert(data, **self._given(labels), num_inference_steps=steps)
        again = self.generate(labels, found.latents, steps, initial_velocity=found.initial_velocity)
        return again, 2 * steps + 1

    def path(self, labels, noise, steps):
        pipe, x = self.pipe, noise
        tokens, pooled = self.prompts(labels)
        conditions = dict(encoder_hidden_states=tokens, pooled_projections=pooled)
        h = pipe.scheduler.config.h
        v0 = predict(pipe.velocity, x, torch.zeros(len(x)), conditions, h)
        pipe.scheduler.set_timesteps(steps)
        for timestep in pipe.scheduler.timesteps:
            t = pipe.scheduler.time(timestep)
            a = predict(pipe.acceleration, x, torch.full((len(x),), t), conditions, h, v0)
            yield x, v0 + a * t
            x = pipe.scheduler.step(a, timestep, x, v0).prev_sample
        yield x, v0 + a
