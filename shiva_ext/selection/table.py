"""The compiled schedule: a look-up table from noise level and layer to a number of tokens."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .budget import alike_runs, solve_budget


class RatioTable:
    """Ratios on a grid of noise levels, read as Python numbers so that shapes stay static.

    Between grid points the *nearest* row counts (the lower one at a midpoint). Interpolation would be smoother, but it
    would invent token counts: only the rows themselves have the total that :meth:`with_budget` solved for, and a table
    of S rows never asks for more distinct shapes than it holds, at any number of steps.

    Args:
        sigmas: [S], strictly ascending noise levels in [0, 1], 1 being pure noise.
        ratios: [S,L] in (0, 1]; kept as float32.
        first_layer: layers before it are never pruned; their ratio must be 1.

    Attributes:
        sigmas: tuple of S floats.
        ratios_tensor: [S,L] float32, on the CPU.
        first_layer: as given.
    """

    def __init__(self, sigmas: Sequence[float] | Tensor, ratios: Tensor, first_layer: int = 1):
        sigmas = torch.as_tensor(sigmas, dtype=torch.float32, device="cpu").detach()
        ratios = torch.as_tensor(ratios, dtype=torch.float32, device="cpu").detach().contiguous()
        if sigmas.ndim != 1 or ratios.ndim != 2 or not 0 < len(sigmas) == len(ratios):
            raise ValueError(
                f"RatioTable: sigmas has shape {tuple(sigmas.shape)} and ratios {tuple(ratios.shape)}, "
                "wanted [S] and [S,L] with S at least 1"
            )
        if not (0 <= sigmas[0] and sigmas[-1] <= 1 and bool((sigmas[1:] > sigmas[:-1]).all())):
            raise ValueError(f"RatioTable: sigmas is {sigmas.tolist()}, wanted strictly ascending levels in [0, 1]")
        if not bool(((ratios > 0) & (ratios <= 1)).all()):
            raise ValueError("RatioTable: ratios has entries outside (0, 1]; the policy gives a sigmoid's output")
        if not 0 <= first_layer < ratios.shape[1]:
            raise ValueError(f"RatioTable: first_layer is {first_layer}, wanted 0 to {ratios.shape[1] - 1}")
        if not bool((ratios[:, :first_layer] == 1).all()):
            raise ValueError(f"RatioTable: the first {first_layer} layers are never pruned, their ratio must be 1")
        self.sigmas: tuple[float, ...] = tuple(sigmas.tolist())
        self.ratios_tensor = ratios
        self.first_layer = first_layer
        self._rows = tuple(tuple(row) for row in ratios.tolist())

    @classmethod
    def fixed(cls, ratio: float, num_layers: int, first_layer: int = 1) -> "RatioTable":
        """The same ratio in all pruned layers at all noise levels."""
        ratios = torch.full((1, num_layers), float(ratio), dtype=torch.float32, device="cpu")
        ratios[:, :first_layer] = 1
        return cls([0.5], ratios, first_layer)

    @classmethod
    @torch.no_grad()
    def from_policy(cls, policy, grid: Iterable[float] | Tensor) -> "RatioTable":
        """Evaluate a :class:`~shiva_ext.selection.policy.RatioPolicy` on ``grid``, noise levels in any order.

        The sampler's own levels make the best grid: then nothing is rounded to a neighbour.
        """
        grid = grid if isinstance(grid, Tensor) else list(grid)
        grid = torch.as_tensor(grid, dtype=torch.float32, device="cpu").unique()
        device = policy.anchor.device
        return cls(grid, policy(grid.to(device)).cpu(), policy.config.first_layer)

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "RatioTable":
        """The inverse of :meth:`to_tensors`."""
        return cls(tensors["sigmas"], tensors["ratios"], int(tensors["first_layer"]))

    def to_tensors(self) -> dict[str, Tensor]:
        """The table as plain tensors, for safetensors."""
        return {
            "sigmas": torch.tensor(self.sigmas, dtype=torch.float32),
            "ratios": self.ratios_tensor.clone(),
            "first_layer": torch.tensor(self.first_layer),
        }

    @property
    def num_layers(self) -> int:
        return self.ratios_tensor.shape[1]

    def ratios(self, sigma: float) -> tuple[float, ...]:
        """The ratio of each layer at noise level ``sigma``, as L Python floats.

        Raises:
            ValueError: sigma is outside [0, 1].
        """
        if not 0 <= sigma <= 1:
            raise ValueError(f"RatioTable: sigma is {sigma}, wanted a noise level in [0, 1]: timestep / 1000")
        nearest = 0
        for row, level in enumerate(self.sigmas):  # a loop, because torch.compile cannot trace min(..., key=...)
            if abs(level - sigma) < abs(self.sigmas[nearest] - sigma):
                nearest = row
        return self._rows[nearest]

    def tokens(self, sigma: float, num_tokens: int, tile: int = 1) -> tuple[int, ...]:
        """The number of tokens that each layer processes at noise level ``sigma``, as L Python ints.

        ``floor(num_tokens * ratio)``, rounded to the nearest multiple of ``tile`` (up at a midpoint). All of the
        tokens, and never none of them, are always among the choices: a ratio of 1 gives exactly ``num_tokens``.
        """
        if num_tokens < 1 or tile < 1:
            raise ValueError(f"RatioTable: num_tokens is {num_tokens} and tile {tile}, wanted at least 1 of each")
        return tuple(_round_to_tile(_floor(num_tokens, ratio), num_tokens, tile) for ratio in self.ratios(sigma))

    def mean(self, cost: Sequence[int] | Tensor | None = None) -> float:
        """Mean ratio over the grid and the pruned layers, weighted by ``cost``; what the budget is about."""
        pruned = self.ratios_tensor[:, self.first_layer :].double()
        weights = torch.as_tensor(1 if cost is None else cost, device="cpu").expand(pruned.shape)
        return ((pruned * weights).sum() / weights.sum()).item()

    def at_levels(self, sigmas: Sequence[float] | Tensor) -> "RatioTable":
        """The table on other noise levels, in any order: each gets the row that :meth:`ratios` reads there."""
        levels = torch.as_tensor(sigmas, dtype=torch.float32, device="cpu").detach().unique()
        rows = torch.tensor([self.ratios(sigma) for sigma in levels.tolist()], dtype=torch.float32, device="cpu")
        return RatioTable(levels, rows, self.first_layer)

    def with_budget(
        self,
        budget: float,
        num_tokens: int,
        tile: int = 1,
        cost: Sequence[int] | Tensor | None = None,
        max_distinct: int | None = None,
        together: Sequence[int] | None = None,
    ) -> "RatioTable":
        """The nearest table whose token counts, in multiples of ``tile``, meet ``budget``; see :func:`solve_budget`.

        Args:
            budget: the wanted mean ratio of the pruned layers.
            num_tokens: tokens of the image size that the table is solved for; it serves the others nearly as well.
            tile: the token counts' unit; it divides ``num_tokens``.
            cost: relative cost of a token in each pruned layer, [L - first_layer] or [S, L - first_layer], integers.
            max_distinct: at most so many different rows: neighbouring noise levels share one, those that are most
                alike. Each row is a graph of its own to a compiler.
            together: sizes of runs of pruned layers that share their count, such as ``(2, 2, 1)``.
        """
        with torch.device("cpu"):  # whatever device is the default one
            return self._solved(budget, num_tokens, tile, cost, max_distinct, together)

    def _solved(self, budget, num_tokens, tile, cost, max_distinct, together) -> "RatioTable":
        learned = self.ratios_tensor[:, self.first_layer :].double()
        S, P = learned.shape
        if max_distinct is not None and max_distinct < 1:
            raise ValueError(f"RatioTable: max_distinct is {max_distinct}, wanted at least 1")
        if together is not None and (min(together) < 1 or sum(together) != P):
            raise ValueError(f"RatioTable: together is {tuple(together)}, wanted positive sizes that add up to {P}")
        ends = list(range(1, S + 1)) if max_distinct is None or max_distinct >= S else alike_runs(learned, max_distinct)
        rows = [end - begin for begin, end in pairwise((0, *ends))]
        columns = [1] * P if together is None else list(together)

        def merged(values: Tensor) -> Tensor:
            sums = torch.stack([part.sum(dim=0) for part in values.split(rows)])
            return torch.stack([part.sum(dim=1) for part in sums.split(columns, dim=1)], dim=1)

        cost = torch.as_tensor(1 if cost is None else cost)
        sizes = merged(torch.ones(S, P, dtype=torch.int64))
        solved = solve_budget(merged(learned) / sizes, num_tokens, budget, tile, merged(cost.expand(S, P)), sizes)
        solved = solved.repeat_interleave(torch.tensor(rows), dim=0).repeat_interleave(torch.tensor(columns), dim=1)
        ratios = self.ratios_tensor.clone()
        ratios[:, self.first_layer :] = solved.double() / num_tokens
        return RatioTable(self.sigmas, ratios, self.first_layer)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, RatioTable)
            and (self.sigmas, self.first_layer) == (other.sigmas, other.first_layer)
            and torch.equal(self.ratios_tensor, other.ratios_tensor)
        )

    __hash__ = None

    def __repr__(self) -> str:
        S, L = self.ratios_tensor.shape
        return f"RatioTable({S} noise levels x {L} layers, mean ratio {self.mean():.3f})"


def _floor(num_tokens: int, ratio: float) -> int:
    """floor(num_tokens * ratio), for a ratio that is k / num_tokens rounded to float32 exactly k."""
    return min(math.floor(num_tokens * (ratio + 2**-24)), num_tokens)


def _round_to_tile(k: int, num_tokens: int, tile: int) -> int:
    """k rounded to a multiple of tile or to num_tokens, and never to 0."""
    lower = k // tile * tile
    upper = min(lower + tile, num_tokens)
    return lower if lower and k - lower < upper - k else upper
