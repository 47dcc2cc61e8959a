"""The learned schedule of ratios over noise levels and layers, and the loss that holds it to a budget."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn


@dataclass(frozen=True)
class PolicyConfig:
    """Shape of a :class:`RatioPolicy`.

    Attributes:
        num_layers: number L of the model's blocks, the unpruned ones included.
        target: the ratio that every pruned layer starts from, in (0, 1).
        hidden: width of the MLPs, of the sinusoidal embedding and of the layer embedding.
        first_layer: layers before it are never pruned; their ratio is the constant 1.
    """

    num_layers: int
    target: float
    hidden: int = 256
    first_layer: int = 1

    def __post_init__(self):
        if not 0 < self.target < 1:
            raise ValueError(f"PolicyConfig: target is {self.target}, wanted a ratio between 0 and 1, both excluded")
        if not 0 <= self.first_layer < self.num_layers:
            raise ValueError(
                f"PolicyConfig: first_layer is {self.first_layer}, wanted 0 to {self.num_layers - 1}, "
                "so that at least one layer is pruned"
            )


def _mlp(hidden: int) -> nn.Sequential:
    """Two-layer SiLU MLP to one logit that is 0 until it has learned something."""
    mlp = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1, bias=False))
    nn.init.zeros_(mlp[2].weight)
    return mlp


class RatioPolicy(nn.Module):
    """The share of tokens that each layer processes at each noise level.

    Shiva-DiT (arXiv 2602.05605), eq. 10 and 11: ``ratio = sigmoid(time(sinusoid(t)) + layer(e_l) + b)``. Time and depth
    add up as logits, on purpose: the paper takes the trend over time to be the same at every depth. ``b`` starts at
    ``logit(target)`` and the two branches at 0, so that training starts from the target everywhere.

    It depends on nothing but (t, layer), so generation never runs it: see :meth:`RatioTable.from_policy`.

    Args:
        num_layers, target, hidden, first_layer: see :class:`PolicyConfig`.
    """

    def __init__(self, num_layers: int, target: float, **options):
        super().__init__()
        self.config = config = PolicyConfig(num_layers, target, **options)
        self.time = _mlp(config.hidden)
        self.layer = _mlp(config.hidden)
        self.layer_embedding = nn.Parameter(torch.randn(config.num_layers - config.first_layer, config.hidden))
        self.anchor = nn.Parameter(torch.tensor(math.log(config.target / (1 - config.target))))

    @classmethod
    def from_config(cls, config: PolicyConfig) -> "RatioPolicy":
        """A freshly initialised policy of this shape."""
        return cls(**vars(config))

    def forward(self, sigma: Tensor, noise: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
        """Ratios at each noise level and layer, in float32 whatever autocast says (a bf16 ratio is off by 1/256).

        Args:
            sigma: [T], noise levels in [0, 1], 1 being pure noise.
            noise: standard deviation of the exploration noise on the logits, eq. 29; the paper uses 1 in its second
                stage. Noisy ratios average closer to 1/2 than noise-free ones, so give the budget loss the latter.
            generator: of the noise.

        Returns:
            [T,L] float32 in (0, 1]; the layers before ``first_layer`` are exactly 1.
        """
        if sigma.ndim != 1:
            raise ValueError(f"RatioPolicy: sigma has shape {tuple(sigma.shape)}, wanted one axis of noise levels")
        T, config = sigma.shape[0], self.config
        with torch.autocast(sigma.device.type, enabled=False):
            sinusoid = get_timestep_embedding(sigma.float() * 1000, config.hidden, flip_sin_to_cos=True)
            logits = self.time(sinusoid) + self.layer(self.layer_embedding).squeeze(-1) + self.anchor
            if noise:
                # Drawn where the generator is, so that a seed means the same on every device.
                place = logits.device if generator is None else generator.device
                logits = logits + noise * torch.randn(logits.shape, generator=generator, device=place).to(logits)
            dense = logits.new_ones(T, config.first_layer)
            return torch.cat([dense, torch.sigmoid(logits)], dim=1)


class BudgetLoss(nn.Module):
    """Pulls the mean ratio towards the target, and leaves its distribution over time and depth free.

    Shiva-DiT (arXiv 2602.05605), eq. 12 and 13, with r the mean ratio of the batch::

        mu   <- beta * r + (1 - beta) * mu          averaged over all ranks
        loss  = weight * r * stopgrad(2 * (mu - target))

    mu is a buffer: it is saved with the state dict. It starts at the target, so the first batches are not mistaken for
    a long history. It moves in train mode only.

    Args:
        target: the wanted mean ratio of the pruned layers.
        weight: the loss's factor.
        beta: weight of the newest batch in mu.
        first_layer: layers before it are never pruned and do not count.
    """

    def __init__(self, target: float, weight: float = 1.0, beta: float = 0.2, first_layer: int = 1):
        super().__init__()
        if not 0 < target <= 1:
            raise ValueError(f"BudgetLoss: target is {target}, wanted a ratio above 0 and at most 1")
        if not 0 < beta <= 1:
            raise ValueError(f"BudgetLoss: beta is {beta}, wanted a weight above 0 and at most 1")
        self.target, self.weight, self.beta, self.first_layer = target, weight, beta, first_layer
        self.register_buffer("mu", torch.tensor(float(target)))

    def forward(self, ratios: Tensor) -> Tensor:
        """Update the average and give the loss.

        Args:
            ratios: [..., L], this rank's ratios without exploration noise. All ranks must call, with equal counts.

        Returns:
            The loss, float32, without axes. Data-parallel averaging of its gradient makes it the global one.
        """
        if ratios.shape[-1] <= self.first_layer:
            raise ValueError(
                f"BudgetLoss: ratios has shape {tuple(ratios.shape)}, wanted more than {self.first_layer} layers "
                "in its last axis, because that many are never pruned"
            )
        mean = ratios[..., self.first_layer :].float().mean()
        if self.training:
            everywhere = mean.detach().clone()
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(everywhere)
                everywhere /= dist.get_world_size()
            self.mu.lerp_(everywhere.to(self.mu.device), self.beta)
        return self.weight * mean * (2 * (self.mu.to(mean.device) - self.target))
