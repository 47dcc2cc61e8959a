"""The compiled schedule: a look-up table from noise level and layer to a number of tokens."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

MAX_COST = 32


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
        sigmas = torch.as_tensor(sigmas, dtype=torch.float32).detach().cpu()
        ratios = torch.as_tensor(ratios, dtype=torch.float32).detach().cpu().contiguous()
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
        ratios = torch.full((1, num_layers), float(ratio))
        ratios[:, :first_layer] = 1
        return cls([0.5], ratios, first_layer)

    @classmethod
    @torch.no_grad()
    def from_policy(cls, policy, grid: Iterable[float] | Tensor) -> "RatioTable":
        """Evaluate a :class:`~shiva_ext.selection.policy.RatioPolicy` on ``grid``, noise levels in any order.

        The sampler's own levels make the best grid: then nothing is rounded to a neighbour.
        """
        grid = torch.as_tensor(grid if isinstance(grid, Tensor) else list(grid), dtype=torch.float32).unique()
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

    def mean(self) -> float:
        """Mean ratio over the grid and the pruned layers; what the budget is about."""
        return self.ratios_tensor[:, self.first_layer :].double().mean().item()

    def with_budget(
        self, budget: float, num_tokens: int, tile: int = 1, cost: Sequence[int] | Tensor | None = None
    ) -> "RatioTable":
        """The nearest table whose token counts, in multiples of ``tile``, meet ``budget``; see :func:`solve_budget`.

        Args:
            budget: the wanted mean ratio of the pruned layers.
            num_tokens: tokens of the image size that the table is solved for; it serves the others nearly as well.
            tile: the token counts' unit; it divides ``num_tokens``.
            cost: relative cost of a token in each pruned layer, [L - first_layer] or [S, L - first_layer].
        """
        solved = solve_budget(self.ratios_tensor[:, self.first_layer :], num_tokens, budget, tile, cost)
        ratios = self.ratios_tensor.clone()
        ratios[:, self.first_layer :] = solved / num_tokens
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


def solve_budget(
    ratios: Tensor,
    num_tokens: int,
    budget: float,
    tile: int = 1,
    cost: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """Round ratios to token counts in multiples of ``tile`` so that their total meets the budget.

    Among the tables whose total cost comes closest to the budget (the lower one, if two do), this is one of those with
    the smallest squared distance to the learned ratios.

    Method, exact: adding tiles in the order of their price (increase of the squared distance per unit of cost) gives
    the optimum for every total it passes; it stops less than one tile of the costliest layer below the budget. By an
    exchange argument, between this table and the optimum at a nearby total no sequence of tile changes can come back to
    the same total, so they are at most 3 * max(cost) tiles apart: dynamic programming over the cells in that small
    neighbourhood finds it.

    Args:
        ratios: [S,L], the pruned layers only.
        num_tokens: N, a multiple of ``tile``.
        budget: the wanted total, as a share of the total of a dense model: in [tile / N, 1].
        tile: tokens.
        cost: relative cost of one token in each cell, as integers from 1 to 32, [L] or [S,L]: for blocks of unequal
            cost, such as those with a second attention. None makes all equal.

    Returns:
        [S,L] int64, each entry a multiple of ``tile`` from ``tile`` to N.

    Raises:
        ValueError: an argument is out of range.
    """
    if ratios.ndim != 2 or ratios.numel() == 0 or not bool(((ratios >= 0) & (ratios <= 1)).all()):
        raise ValueError(f"solve_budget: ratios has shape {tuple(ratios.shape)}, wanted [S,L] with entries in [0, 1]")
    if tile < 1 or num_tokens < 1 or num_tokens % tile:
        raise ValueError(f"solve_budget: tile is {tile}, wanted a divisor of num_tokens, which is {num_tokens}")
    tiles = num_tokens // tile
    if not 1 / tiles <= budget <= 1:
        raise ValueError(f"solve_budget: budget is {budget}, wanted a share from tile / num_tokens = {1 / tiles} to 1")
    price = torch.as_tensor(1 if cost is None else cost)
    if price.is_floating_point() or not bool(((price >= 1) & (price <= MAX_COST)).all()):
        raise ValueError(
            f"solve_budget: cost is {price.tolist()}, wanted integers from 1 to {MAX_COST}: scale the costs and round"
        )
    S, L = ratios.shape
    price = price.expand(S, L).reshape(-1).cpu()
    price = price // math.gcd(*price.tolist())
    wanted = ratios.reshape(-1).cpu().double() * tiles  # in tiles, like everything below

    start, gap = _cheapest_tiles(wanted, price, tiles, budget * tiles * int(price.sum()))
    change = _nearby_optimum(wanted - start, start, price, tiles, gap)
    return ((start + change) * tile).reshape(S, L)


def _cheapest_tiles(wanted: Tensor, price: Tensor, tiles: int, total: float) -> tuple[Tensor, float]:
    """Start with one tile a cell and add the cheapest while the total allows; also returns what is left of it."""
    level = torch.arange(1, tiles)
    increase = (2 * level + 1 - 2 * wanted[:, None]) / price[
        :, None
    ]  # of the squared distance, from level to level + 1
    cell = (torch.argsort(increase.flatten(), stable=True) // max(tiles - 1, 1)).long()
    left = total - price.sum() - price[cell].cumsum(0)
    # 1e-6 forgives a budget such as 0.6 whose product with the token count is a rounding error short of an integer.
    taken = int((left > -1e-6).sum())
    start = 1 + torch.bincount(cell[:taken], minlength=len(wanted))
    return start, total - float((start * price).sum())


def _nearby_optimum(offset: Tensor, start: Tensor, price: Tensor, tiles: int, gap: float) -> Tensor:
    """The change of each cell with the least squared distance to ``offset`` whose total price is nearest to ``gap``."""
    top = int(price.max())
    reach = 3 * top  # of the change of one cell, in tiles
    span = reach * top  # of the running total, in units of cost
    change = torch.arange(-reach, reach + 1)
    state = torch.arange(-span, span + 1)
    best = torch.full((2 * span + 1,), torch.inf, dtype=torch.float64)
    best[span] = 0
    choices = []
    for cell_offset, cell_start, cell_price in zip(offset, start, price, strict=True):
        distance = (change - cell_offset).square()
        distance[(cell_start + change < 1) | (cell_start + change > tiles)] = torch.inf
        before = state - cell_price * change[:, None] + span  # [changes, states]
        reachable = best[before.clamp(0, 2 * span)].masked_fill((before < 0) | (before > 2 * span), torch.inf)
        best, choice = (reachable + distance[:, None]).min(dim=0)
        choices.append(choice)

    miss = (state - gap).abs().masked_fill(best.isinf(), torch.inf)
    at = int(miss.argmin())
    result = torch.empty_like(start)
    for cell in reversed(range(len(start))):
        result[cell] = change[choices[cell][at]]
        at -= int(price[cell] * result[cell])
    return result
