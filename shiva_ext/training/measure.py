"""What a token is worth in each layer at each noise level, by differences of the training loss."""

from collections.abc import Callable

import torch
from torch import Tensor

DELTA = 1 / 8  # of the ratio, to both sides


def ratio_values(loss: Callable[[Tensor], float], ratios: Tensor, first_layer: int, delta: float = DELTA) -> Tensor:
    """How much the loss falls per unit of each layer's ratio, at one noise level.

    Central differences, one layer at a time; at the ends of (0, 1] the interval is cut.

    Args:
        loss: of ratios [L]; the same samples and noise every time.
        ratios: [L], around which it is measured.
        first_layer: layers before it are dense, and worth 0 here.
        delta: half the interval.

    Returns:
        [L] float64.
    """
    values = torch.zeros(len(ratios), dtype=torch.float64)
    for layer in range(first_layer, len(ratios)):
        ends = [min(max(float(ratios[layer]) + side * delta, delta / 4), 1.0) for side in (-1, 1)]
        losses = []
        for end in ends:
            moved = ratios.clone()
            moved[layer] = end
            losses.append(loss(moved))
        values[layer] = (losses[0] - losses[1]) / (ends[1] - ends[0])
    return values
