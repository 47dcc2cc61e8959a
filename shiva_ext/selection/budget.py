"""Rounding of a learned schedule to token counts: the unit they come in, and the budget that they meet exactly."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MOST_COST = 24  # of a cell, for the exact search: its time grows with the third power


def default_tile(num_tokens: int) -> int:
    """Unit of the token counts of a sequence: the largest of 128, 64, 16 and 1 that leaves 64 choices or more.

    A count that is a multiple of the matrix tiles wastes none of them, and few distinct counts are few graphs; 64
    choices are fine enough for the budget. 1 also where a longer tile does not divide the sequence.
    """
    return next(tile for tile in (128, 64, 16, 1) if tile == 1 or (num_tokens % tile == 0 and num_tokens >= 64 * tile))


def alike_runs(rows: Tensor, count: int) -> list[int]:
    """Ends of ``count`` runs of consecutive rows [S,L] whose squared distances to their runs' means are least in sum.

    W. D. Fisher, On grouping for maximum homogeneity, 1958: dynamic programming over the last run's first row.
    """
    S = len(rows)
    sums = torch.cat([torch.zeros_like(rows[:1]), rows.cumsum(0)])
    squares = torch.cat([torch.zeros(1, dtype=rows.dtype), rows.square().sum(1).cumsum(0)])

    def spread(begin: int, end: int) -> float:
        return float(squares[end] - squares[begin] - (sums[end] - sums[begin]).square().sum() / (end - begin))

    best = [spread(0, end) if end else 0.0 for end in range(S + 1)]  # with one run
    starts = []
    for run in range(2, count + 1):
        choices = {
            end: min((best[begin] + spread(begin, end), begin) for begin in range(run - 1, end))
            for end in range(run, S + 1)
        }
        starts.append({end: begin for end, (_, begin) in choices.items()})
        best = [choices[end][0] if end in choices else math.inf for end in range(S + 1)]
    ends = [S]
    for start in reversed(starts):
        ends.insert(0, start[ends[0]])
    return ends


def solve_budget(
    ratios: Tensor,
    num_tokens: int,
    budget: float,
    tile: int = 1,
    cost: Sequence[int] | Tensor | None = None,
    repeats: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """Round ratios to token counts in multiples of ``tile`` so that their total meets the budget.

    Among the tables whose total cost comes closest to the budget (the lower one, if two do), this is one of those with
    the smallest squared distance to the learned ratios.

    Method, exact: adding tiles in the order of their price (increase of the squared distance per unit of cost) gives
    the optimum for every total it passes; it stops less than one tile of the costliest cell below the budget. By an
    exchange argument, between this table and the optimum at a nearby total no sequence of tile changes can come back to
    the same total, so they are at most 3 * max(cost) tiles apart: dynamic programming over the cells in that small
    neighbourhood finds it. Where a cost exceeds 24 after division by the common factor, the first table is the answer:
    the nearest to the learned ratios of all tables of its total, which is within one tile of the budget.

    Args:
        ratios: [S,L], the pruned layers only.
        num_tokens: N, a multiple of ``tile``.
        budget: the wanted total, as a share of the total of a dense model: in [tile / N, 1].
        tile: tokens.
        cost: relative cost of one token in each cell, positive integers, [L] or [S,L]: for blocks of unequal cost, such
            as those with a second attention. None is ``repeats``.
        repeats: how many steps and layers each cell stands for, positive integers, [L] or [S,L]: the weight of its
            squared distance. None is one each.

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
    S, L = ratios.shape
    times = _positive_integers("repeats", 1 if repeats is None else repeats, S, L)
    price = times if cost is None else _positive_integers("cost", cost, S, L)
    price = price // math.gcd(*price.tolist())
    wanted = ratios.reshape(-1).cpu().double() * tiles  # in tiles, like everything below

    start, gap = _cheapest_tiles(wanted, price, times, tiles, budget * tiles * int(price.sum()))
    if int(price.max()) <= MOST_COST:
        start = start + _nearby_optimum(wanted - start, start, price, times, tiles, gap)
    return (start * tile).reshape(S, L)


def _positive_integers(name: str, values: int | Sequence[int] | Tensor, S: int, L: int) -> Tensor:
    """[S*L] int64."""
    values = torch.as_tensor(values).cpu()
    if values.is_floating_point() or not bool((values >= 1).all()):
        raise ValueError(f"solve_budget: {name} is {values.tolist()}, wanted positive integers: scale and round")
    return values.expand(S, L).reshape(-1)


def _cheapest_tiles(wanted: Tensor, price: Tensor, times: Tensor, tiles: int, total: float) -> tuple[Tensor, float]:
    """Start with one tile a cell and add the cheapest while the total allows; also returns what is left of it."""
    level = torch.arange(1, tiles)
    # Of the squared distance, from level to level + 1.
    increase = (2 * level + 1 - 2 * wanted[:, None]) * (times.double() / price)[:, None]
    cell = (torch.argsort(increase.flatten(), stable=True) // max(tiles - 1, 1)).long()
    left = total - price.sum().double() - price[cell].cumsum(0).double()
    # 1e-6 forgives a budget such as 0.6 whose product with the token count is a rounding error short of an integer.
    taken = int((left > -1e-6).sum())
    start = 1 + torch.bincount(cell[:taken], minlength=len(wanted))
    return start, total - float((start * price).sum())


def _nearby_optimum(offset: Tensor, start: Tensor, price: Tensor, times: Tensor, tiles: int, gap: float) -> Tensor:
    """The change of each cell with the least squared distance to ``offset`` whose total price is nearest to ``gap``."""
    top = int(price.max())
    reach = 3 * top  # of the change of one cell, in tiles
    span = reach * top  # of the running total, in units of cost
    change = torch.arange(-reach, reach + 1)
    state = torch.arange(-span, span + 1)
    best = torch.full((2 * span + 1,), torch.inf, dtype=torch.float64)
    best[span] = 0
    choices = []
    for cell_offset, cell_start, cell_price, weight in zip(offset, start, price, times, strict=True):
        distance = (change - cell_offset).square() * weight
        distance[(cell_start + change < 1) | (cell_start + change > tiles)] = torch.inf
        before = state - cell_price * change[:, None] + span  # [changes, states]
        reachable = best[before.clamp(0, 2 * span)].masked_fill((before < 0) | (before > 2 * span), torch.inf)
        best, choice = (reachable + distance[:, None]).min(dim=0)
        choices.append(choice)

    miss = (state.double() - gap).abs().masked_fill(best.isinf(), torch.inf)
    at = int(miss.argmin())
    result = torch.empty_like(start)
    for cell in reversed(range(len(start))):
        result[cell] = change[choices[cell][at]]
        at -= int(price[cell] * result[cell])
    return result
