"""A schedule of ratios that follows from what tokens are worth where: measured, not learned."""

import math

import torch
from torch import Tensor, nn

LOWEST = 0.2  # share of its tokens that a layer keeps, however little they are worth
_POWER = 1 / 3
_REACH = 1.5  # of one update: what is worth much now may be worth little where it has changed


def allocate(ratios: Tensor, values: Tensor, budget: float, lowest: float = LOWEST, reach: float = math.inf) -> Tensor:
    """Move tokens from where they are worth little to where they are worth much.

    At the best schedule of a budget one more token is worth the same wherever it is kept, but for ratios at a bound. If
    a layer's loss falls as ``a / ratio**2``, a token more is worth ``2 * a / ratio**3``, and that schedule is
    ``ratio * (value / price)**(1 / 3)``, with the price that the budget is met at. Where losses fall otherwise this is
    a step on the way: measure again.

    Args:
        ratios: [S,L] in (0, 1], the present ones.
        values: [S,L], how much the loss falls per unit of each ratio. Below a hundredth of the mean they count as that.
        budget: wanted mean, in [lowest, 1].
        lowest: least ratio.
        reach: a ratio changes by no more than this factor, down or up; where the budget cannot be met so, by more.

    Returns:
        [S,L] in [lowest, 1], of mean ``budget``, in the dtype of ``ratios``.

    Raises:
        ValueError: the shapes differ, the values are not finite, the budget cannot be met, or reach is not above 1.
    """
    if ratios.ndim != 2 or ratios.shape != values.shape or not ratios.numel():
        raise ValueError(
            f"allocate: ratios has shape {tuple(ratios.shape)} and values {tuple(values.shape)}, wanted [S,L] twice"
        )
    if not lowest <= budget <= 1 or not 0 < lowest:
        raise ValueError(f"allocate: budget is {budget} and lowest {lowest}, wanted 0 < lowest <= budget <= 1")
    if not torch.isfinite(values).all():
        raise ValueError("allocate: values holds NaN or infinity, wanted finite differences of the loss")
    if not reach > 1:
        raise ValueError(f"allocate: reach is {reach}, wanted a factor above 1")
    wide, worth = ratios.double(), values.double()
    worth = worth.clamp_min(max(float(worth.clamp_min(0).mean()) / 100, 1e-300))
    wanted = wide * worth.pow(_POWER)
    least, most = (wide / reach).clamp(lowest, 1), (wide * reach).clamp(lowest, 1)
    if not float(least.mean()) <= budget <= float(most.mean()):
        least, most = torch.full_like(wide, lowest), torch.ones_like(wide)
    low, high = 0.0, 1 / float(wanted.min())  # of price**(-1 / 3); at the upper one all ratios are at their most
    for _ in range(100):
        middle = (low + high) / 2
        if float(torch.clamp(wanted * middle, least, most).mean()) < budget:
            low = middle
        else:
            high = middle
    return torch.clamp(wanted * high, least, most).to(ratios.dtype)


class RatioSchedule(nn.Module):
    """Ratios at even noise levels, straight lines between them: a policy without weights.

    Args:
        levels: number S of noise levels: 1 / S, 2 / S, ..., 1.
        num_layers: number L of the model's blocks.
        ratio: of all pruned layers in the beginning.
        first_layer: layers before it are never pruned; their ratio is 1.

    Attributes:
        sigmas: [S], ascending.
        ratios: [S,L].
    """

    def __init__(self, levels: int, num_layers: int, ratio: float, first_layer: int = 1):
        super().__init__()
        if levels < 1 or not 0 < ratio <= 1 or not 0 <= first_layer < num_layers:
            raise ValueError(
                f"RatioSchedule: levels is {levels}, ratio {ratio} and first_layer {first_layer}, wanted at least 1 "
                f"level, a ratio in (0, 1] and 0 to {num_layers - 1} dense layers"
            )
        self.first_layer = first_layer
        self.register_buffer("sigmas", torch.arange(1, levels + 1) / levels)
        ratios = torch.full((levels, num_layers), float(ratio))
        ratios[:, :first_layer] = 1
        self.register_buffer("ratios", ratios)

    def forward(self, sigma: Tensor) -> Tensor:
        """Ratios [T,L] at the noise levels sigma [T]; beyond the ends those of the ends."""
        if sigma.ndim != 1:
            raise ValueError(f"RatioSchedule: sigma has shape {tuple(sigma.shape)}, wanted one axis of noise levels")
        S = len(self.sigmas)
        place = (sigma.float() * S - 1).clamp(0, S - 1)
        below = place.floor().long().clamp(max=max(S - 2, 0))
        above = (below + 1).clamp(max=S - 1)
        return torch.lerp(self.ratios[below], self.ratios[above], (place - below)[:, None])

    def update(self, values: Tensor, budget: float, lowest: float = LOWEST) -> None:
        """Reallocate by the values [S,L] of all layers, see :func:`allocate`; levels are averaged 1:2:1 first."""
        pruned = values[:, self.first_layer :]
        smooth = (torch.cat([pruned[:1], pruned[:-1]]) + 2 * pruned + torch.cat([pruned[1:], pruned[-1:]])) / 4
        found = allocate(self.ratios[:, self.first_layer :], smooth.to(self.ratios.device), budget, lowest, _REACH)
        self.ratios[:, self.first_layer :] = found
