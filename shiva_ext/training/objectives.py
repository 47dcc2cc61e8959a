"""What a diffusion model is trained to predict, chosen from its pipeline's scheduler."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


def _beside(values: Tensor, like: Tensor) -> Tensor:
    """values [B] with axes to multiply a tensor of a batch of B."""
    return values.to(like).view(-1, *[1] * (like.ndim - 1))


class Objective(ABC):
    """Maps clean latents, noise, and noise levels sigma [B] in [0, 1] to a training example.

    Latents have any axes behind the batch's.
    """

    @abstractmethod
    def noisy(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """The model's input."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """What the model's output should be."""

    @abstractmethod
    def timestep(self, sigma: Tensor) -> Tensor:
        """The timesteps [B] that the scheduler would give the model, from 0 to 1000."""

    @abstractmethod
    def step(self, noisy: Tensor, output: Tensor, now: float, after: float) -> Tensor:
        """Latents at the noise level ``after`` from those at ``now`` and the model's output there."""


class FlowMatching(Objective):
    """Straight paths from data to noise; the model predicts their velocity, ``noise - latents``."""

    def noisy(self, latents, noise, sigma):
        level = _beside(sigma, latents)
        return (1 - level) * latents + level * noise

    def target(self, latents, noise, sigma):
        return noise - latents

    def timestep(self, sigma):
        return sigma * 1000

    def step(self, noisy, output, now, after):
        return noisy + (after - now) * output


class Denoising(Objective):
    """Diffusion in discrete steps; the model predicts the noise or the velocity (arXiv 2202.00512, appendix D).

    Args:
        alphas_cumprod: [T], the scheduler's.
        prediction_type: "epsilon" or "v_prediction".
    """

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str = "epsilon"):
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"Denoising: prediction_type is {prediction_type!r}, wanted 'epsilon' or 'v_prediction'")
        self.alphas_cumprod, self.prediction_type = alphas_cumprod.detach().float().cpu(), prediction_type

    def timestep(self, sigma):
        T = len(self.alphas_cumprod)
        return (sigma * T).long().clamp(max=T - 1)

    def _scales(self, sigma: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self.alphas_cumprod[self.timestep(sigma).cpu()]
        return _beside(alpha.sqrt(), like), _beside((1 - alpha).sqrt(), like)

    def noisy(self, latents, noise, sigma):
        signal, spread = self._scales(sigma, latents)
        return signal * latents + spread * noise

    def target(self, latents, noise, sigma):
        if self.prediction_type == "epsilon":
            return noise
        signal, spread = self._scales(sigma, latents)
        return signal * noise - spread * latents

    def step(self, noisy, output, now, after):
        """DDIM without noise (arXiv 2010.02502), eq. 12."""
        signal, spread = self._scales(torch.tensor([now]), noisy)
        if self.prediction_type == "epsilon":
            noise, clean = output, (noisy - spread * output) / signal
        else:
            noise, clean = spread * noisy + signal * output, signal * noisy - spread * output
        if after == 0:
            return clean
        signal, spread = self._scales(torch.tensor([after]), noisy)
        return signal * clean + spread * noise


def objective_for(scheduler) -> Objective:
    """The objective that a pipeline's scheduler implies.

    Raises:
        ValueError: it implies none that is known here.
    """
    config = scheduler.config
    prediction = config.get("prediction_type", "epsilon")
    if "FlowMatch" in type(scheduler).__name__ or prediction == "flow_prediction" or config.get("use_flow_sigmas"):
        return FlowMatching()
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if not torch.is_tensor(alphas):
        raise ValueError(
            f"shiva_ext: {type(scheduler).__name__} is neither a flow-matching scheduler nor one with alphas_cumprod; "
            "load the pipeline with the scheduler that its model was trained with"
        )
    return Denoising(alphas, prediction)
