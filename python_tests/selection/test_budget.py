"""The budget solver against brute force, the unit of token counts, and the rows that noise levels share."""

import itertools

import pytest
import torch

from shiva_ext.selection import RatioTable, default_tile, solve_budget
from shiva_ext.selection.budget import alike_runs


def brute_force(ratios, num_tokens, budget, tile, cost, repeats=None):
    """The least (miss of the budget, total, squared distance) over all tables, and the terms it is made of."""
    S, L = ratios.shape
    times = [1] * S * L if repeats is None else [n for n in repeats for _ in range(L)]
    weights = torch.as_tensor(1 if cost is None else cost).expand(S, L).flatten().tolist()
    weights = [w * n for w, n in zip(weights, times, strict=True)]
    wanted = (ratios.flatten().double() * num_tokens).tolist()
    total = budget * num_tokens * sum(weights)
    best = None
    for counts in itertools.product(range(tile, num_tokens + 1, tile), repeat=S * L):
        spent = sum(k * w for k, w in zip(counts, weights, strict=True))
        distance = sum(n * (k - r) ** 2 for k, r, n in zip(counts, wanted, times, strict=True))
        key = (round(abs(spent - total), 6), spent, distance)
        best = key if best is None else min(best, key)
    return best, weights, wanted, total


@pytest.mark.parametrize("cost", [None, [1, 2], [3, 2], [5, 5], [7, 3]])
@pytest.mark.parametrize("seed", range(8))
def test_the_solver_equals_brute_force(cost, seed):
    torch.manual_seed(seed)
    ratios = torch.rand(2, 2)
    tile = (1, 2, 3)[seed % 3]
    num_tokens = tile * 6
    for budget in (1 / 6, 0.31, 0.5, 0.62, 0.9, 1.0):
        (miss, _, distance), weights, wanted, total = brute_force(ratios, num_tokens, budget, tile, cost)
        solved = solve_budget(ratios, num_tokens, budget, tile, cost)
        counts = solved.flatten().tolist()
        assert solved.dtype == torch.int64 and all(k % tile == 0 and tile <= k <= num_tokens for k in counts)
        assert abs(sum(k * w for k, w in zip(counts, weights, strict=True)) - total) == pytest.approx(miss, abs=1e-5)
        assert sum((k - r) ** 2 for k, r in zip(counts, wanted, strict=True)) == pytest.approx(distance, abs=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_the_solver_equals_brute_force_with_a_cost_of_its_own_in_every_cell(seed):
    generator = torch.Generator().manual_seed(seed)
    ratios, cost = torch.rand(1, 5, generator=generator), torch.randint(1, 9, (1, 5), generator=generator)
    for budget in (0.3, 0.55, 0.8):
        (miss, _, distance), weights, wanted, total = brute_force(ratios, 5, budget, 1, cost)
        counts = solve_budget(ratios, 5, budget, 1, cost).flatten().tolist()
        assert abs(sum(k * w for k, w in zip(counts, weights, strict=True)) - total) == pytest.approx(miss, abs=1e-5)
        assert sum((k - r) ** 2 for k, r in zip(counts, wanted, strict=True)) == pytest.approx(distance, abs=1e-5)


@pytest.mark.parametrize("tile", [1, 64])
@pytest.mark.parametrize("cost", [None, [4] * 13 + [3] * 10])
def test_a_table_of_real_size_meets_its_budget_to_within_a_tile(tile, cost):
    torch.manual_seed(0)
    num_tokens = 1024
    ratios = torch.rand(20, 23)
    solved = solve_budget(ratios, num_tokens, 0.6, tile, cost)
    weights = torch.as_tensor(1 if cost is None else cost).expand(20, 23)
    assert abs((solved * weights).sum() - 0.6 * num_tokens * weights.sum()) <= tile
    shift = 0.6 - ratios.mean()
    assert (solved / num_tokens - ratios).abs().max() < abs(shift) * 4 + tile / num_tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile": 3}, "tile is 3, wanted a divisor of num_tokens, which is 16"),
        ({"tile": 0}, "tile is 0"),
        ({"budget": 0.01}, "budget is 0.01"),
        ({"budget": 1.01}, "budget is 1.01"),
        ({"budget": float("nan")}, "budget is nan"),
        ({"cost": [0, 1]}, "cost is"),
        ({"cost": [1.5, 1.0]}, "positive integers: scale and round"),
        ({"ratios": torch.full((2, 2), float("nan"))}, "ratios has shape"),
        ({"ratios": torch.rand(2)}, "ratios has shape"),
        ({"ratios": torch.rand(0, 2)}, "ratios has shape"),
    ],
)
def test_a_bad_argument_of_the_solver_is_named(change, message):
    arguments = {"ratios": torch.rand(2, 2), "num_tokens": 16, "budget": 0.5, "tile": 4, **change}
    with pytest.raises(ValueError, match=message):
        solve_budget(**arguments)


@pytest.mark.parametrize("repeats", [[1, 2], [3, 1], [2, 2], [5, 3]])
@pytest.mark.parametrize("cost", [None, [2, 1]])
def test_rows_that_stand_for_several_steps_count_so_often(repeats, cost):
    torch.manual_seed(sum(repeats))
    ratios = torch.rand(2, 2)
    for budget in (0.3, 0.5, 0.71):
        (miss, _, distance), weights, wanted, total = brute_force(ratios, 6, budget, 1, cost, repeats)
        times = torch.tensor(repeats)[:, None].expand(2, 2)
        price = None if cost is None else torch.tensor(cost) * times
        counts = solve_budget(ratios, 6, budget, 1, price, times).flatten().tolist()
        assert abs(sum(k * w for k, w in zip(counts, weights, strict=True)) - total) == pytest.approx(miss, abs=1e-5)
        found = [(k - r) ** 2 for k, r in zip(counts, wanted, strict=True)]
        assert sum(d * repeats[i // 2] for i, d in enumerate(found)) == pytest.approx(distance, abs=1e-5)


def test_prices_too_fine_for_the_search_still_meet_the_budget_to_within_a_tile():
    torch.manual_seed(0)
    ratios, repeats = torch.rand(3, 4), torch.tensor([[7], [11], [13]])
    price = torch.tensor([31, 32, 29, 23]) * repeats
    solved = solve_budget(ratios, 1024, 0.6, 16, price, repeats)
    missing = 0.6 * 1024 * price.sum() - (solved * price).sum()
    assert 0 <= missing < 16 * price.max()


@pytest.mark.parametrize(
    ("num_tokens", "tile"),
    [(1, 1), (196, 1), (256, 1), (1023, 1), (1024, 16), (1040, 16), (4096, 64), (4097, 1), (4104, 1), (16384, 128)],
)
def test_the_default_tile_divides_the_sequence_and_leaves_64_choices(num_tokens, tile):
    assert default_tile(num_tokens) == tile
    assert num_tokens % tile == 0 and (tile == 1 or num_tokens // tile >= 64)


@pytest.mark.parametrize("seed", range(6))
def test_alike_runs_equal_brute_force(seed):
    torch.manual_seed(seed)
    rows = torch.rand(7, 2, dtype=torch.float64)

    def spread(ends):
        parts = rows.split([end - begin for begin, end in itertools.pairwise((0, *ends))])
        return sum(float((part - part.mean(0)).square().sum()) for part in parts)

    for count in range(1, 8):
        ends = alike_runs(rows, count)
        assert len(ends) == count and ends == sorted(set(ends)) and ends[-1] == 7 and ends[0] > 0
        best = min(spread((*cuts, 7)) for cuts in itertools.combinations(range(1, 7), count - 1))
        assert spread(ends) == pytest.approx(best, abs=1e-12)


def smooth_table(steps=20, layers=6):
    sigma, layer = torch.linspace(0, 1, steps)[:, None], torch.linspace(0, 1, layers)
    ratios = 0.35 + 0.4 * sigma * layer + 0.1 * torch.sin(9 * sigma)
    ratios[:, 0] = 1
    return RatioTable(sigma.flatten(), ratios)


@pytest.mark.parametrize("most", [1, 2, 5, 19, 20, 50])
def test_at_most_so_many_rows_differ_and_the_budget_holds_over_all_steps(most):
    table = smooth_table().with_budget(0.55, 1024, tile=16, max_distinct=most)
    kept = torch.tensor([table.tokens(sigma, 1024, 16) for sigma in table.sigmas])
    assert len(kept.unique(dim=0)) <= most and (kept[:, 0] == 1024).all()
    # A shared row moves by a tile at a time, so the total can miss by half of that in each of its steps.
    assert abs(int(kept[:, 1:].sum()) - 0.55 * 1024 * 100) <= 16 * 20 / min(most, 20)
    assert (kept % 16 == 0).all()


def test_more_rows_are_never_farther_from_the_learned_schedule():
    learned = smooth_table()
    distances = []
    for most in (1, 2, 4, 8, 20):
        solved = learned.with_budget(learned.mean(), 4096, tile=1, max_distinct=most)
        distances.append(float((solved.ratios_tensor - learned.ratios_tensor).square().sum()))
    assert distances == sorted(distances, reverse=True) and distances[-1] < 1e-4


def test_shared_rows_take_costs_by_layer():
    cost = [4, 4, 3, 3, 3]
    table = smooth_table().with_budget(0.55, 1024, tile=16, cost=cost, max_distinct=3)
    kept = torch.tensor([table.tokens(sigma, 1024)[1:] for sigma in table.sigmas])
    assert len(kept.unique(dim=0)) <= 3
    assert abs(float((kept * torch.tensor(cost)).sum()) / (0.55 * 1024 * 20 * sum(cost)) - 1) < 0.01


@pytest.mark.parametrize("most", [None, 3])
def test_layers_together_share_their_counts(most):
    table = smooth_table().with_budget(0.55, 1024, 16, [4, 4, 3, 3, 3], most, together=(2, 2, 1))
    kept = torch.tensor([table.tokens(sigma, 1024)[1:] for sigma in table.sigmas])
    assert (kept[:, 0] == kept[:, 1]).all() and (kept[:, 2] == kept[:, 3]).all()
    assert not (kept[:, 1] == kept[:, 2]).all() and not (kept[:, 3] == kept[:, 4]).all()
    spent = (kept * torch.tensor([4, 4, 3, 3, 3])).sum()
    longest = torch.unique(kept, dim=0, return_counts=True)[1].max()
    assert abs(spent - 0.55 * 1024 * 20 * 17) <= 16 * 8 * longest  # one tile of the costliest shared cell


def test_bad_arguments_of_shared_cells_are_named():
    with pytest.raises(ValueError, match="max_distinct is 0, wanted at least 1"):
        smooth_table().with_budget(0.5, 1024, max_distinct=0)
    for together in ((2, 2), (5, 0), (2, 2, 2)):
        with pytest.raises(ValueError, match="together is .*, wanted positive sizes that add up to 5"):
            smooth_table().with_budget(0.5, 1024, together=together)
    for repeats in ([0, 1], [1.5, 1.0]):
        with pytest.raises(ValueError, match="repeats is .*, wanted positive integers"):
            solve_budget(torch.rand(2, 2), 16, 0.5, 4, None, repeats)
