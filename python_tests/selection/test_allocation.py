"""Reallocation of a budget against its optimality conditions, and the schedule that holds it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shiva_ext.selection.allocation import LOWEST, RatioSchedule, allocate


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), budget=st.floats(LOWEST, 1), S=st.integers(1, 4), L=st.integers(1, 5))
def test_the_mean_is_the_budget_and_inside_the_bounds_the_law_holds(seed, budget, S, L):
    generator = torch.Generator().manual_seed(seed)
    ratios = 0.2 + 0.8 * torch.rand(S, L, generator=generator, dtype=torch.float64)
    values = 10 ** (2 * torch.rand(S, L, generator=generator, dtype=torch.float64))
    found = allocate(ratios, values, budget)
    assert found.mean().item() == pytest.approx(budget, abs=1e-6)
    assert (found >= LOWEST).all() and (found <= 1).all()
    inside = (found > LOWEST + 1e-9) & (found < 1 - 1e-9)
    price = values * (ratios / found) ** 3  # what a token more is worth then
    if inside.any():
        at = price[inside]
        torch.testing.assert_close(at, at[:1].expand_as(at), rtol=1e-4, atol=0)
        # A ratio at its upper bound is still worth more than the price, one at the lower bound no more.
        assert (price[found >= 1 - 1e-9] >= at[0] * (1 - 1e-4)).all()
        assert (price[found <= LOWEST + 1e-9] <= at[0] * (1 + 1e-4)).all()


def test_it_finds_the_best_schedule_of_losses_that_fall_as_it_takes_them_to():
    worth = torch.tensor([[1.0, 8.0], [27.0, 1.0]], dtype=torch.float64)
    ratios = torch.full((2, 2), 0.4, dtype=torch.float64)
    found = allocate(ratios, 2 * worth / ratios**3, 0.4)

    def loss(r):
        return (worth / r**2).sum()

    torch.testing.assert_close(found, 1.6 * torch.tensor([[1.0, 2.0], [3.0, 1.0]], dtype=torch.float64) / 7)
    for _ in range(200):  # no move that keeps the mean is better
        move = torch.randn(2, 2, dtype=torch.float64) * 0.01
        other = found + move - move.mean()
        if (other >= LOWEST).all():
            assert loss(other) >= loss(found) - 1e-9
    torch.testing.assert_close(allocate(found, 2 * worth / found**3, 0.4), found)


@pytest.mark.parametrize("values", [[0.0, 0.0], [-1.0, -2.0]])
def test_where_tokens_are_worth_nothing_the_ratios_keep_their_proportions(values):
    found = allocate(torch.tensor([[0.3, 0.6]]), torch.tensor([values]), 0.6)
    torch.testing.assert_close(found, torch.tensor([[0.4, 0.8]]))


def test_a_ratio_that_hurts_falls_but_never_below_the_bound():
    found = allocate(torch.tensor([[0.5, 0.5]]), torch.tensor([[-3.0, 10.0]]), 0.5)
    assert found[0, 0] == pytest.approx(LOWEST) and found[0, 1] == pytest.approx(1 - LOWEST, abs=1e-5)


@pytest.mark.parametrize(
    ("ratios", "values", "budget", "message"),
    [
        (torch.ones(2, 2), torch.ones(2, 3), 0.5, r"shape \(2, 2\) and values \(2, 3\)"),
        (torch.ones(0, 2), torch.ones(0, 2), 0.5, "wanted"),
        (torch.ones(1, 2), torch.tensor([[1.0, float("nan")]]), 0.5, "NaN or infinity"),
        (torch.ones(1, 2), torch.ones(1, 2), LOWEST / 2, "budget is"),
        (torch.ones(1, 2), torch.ones(1, 2), 1.1, "budget is"),
    ],
)
def test_what_cannot_be_allocated_is_refused(ratios, values, budget, message):
    with pytest.raises(ValueError, match=message):
        allocate(ratios, values, budget)


def test_a_schedule_begins_at_the_budget_and_is_read_along_straight_lines():
    schedule = RatioSchedule(4, 3, 0.5)
    assert (schedule(torch.tensor([0.0, 0.3, 1.0])) == torch.tensor([1, 0.5, 0.5])).all()
    schedule.ratios[:, 2] = torch.tensor([0.2, 0.4, 0.8, 0.6])
    got = schedule(torch.tensor([0.0, 0.25, 0.375, 0.75, 0.9, 1.0]))[:, 2]
    torch.testing.assert_close(got, torch.tensor([0.2, 0.2, 0.3, 0.8, 0.68, 0.6]))
    torch.testing.assert_close(RatioSchedule(1, 2, 0.5)(torch.tensor([0.3])), torch.tensor([[1.0, 0.5]]))


def test_an_update_smooths_over_neighbouring_levels_and_leaves_dense_layers_alone():
    schedule = RatioSchedule(3, 4, 0.5, first_layer=2)
    values = torch.zeros(3, 4, dtype=torch.float64)
    values[:, 2:] = 1.0
    values[:, 0] = 1e9  # of a dense layer: nobody asks
    values[1, 3] = 8.0
    schedule.update(values, 0.5)
    assert (schedule.ratios[:, :2] == 1).all()
    assert schedule.ratios[:, 2:].mean().item() == pytest.approx(0.5, abs=1e-6)
    smooth = torch.tensor([[1, (3 + 8) / 4], [1, (2 + 16) / 4], [1, (3 + 8) / 4]])
    wanted = allocate(torch.full((3, 2), 0.5), smooth, 0.5)
    torch.testing.assert_close(schedule.ratios[:, 2:], wanted)


@pytest.mark.parametrize("options", [(0, 3, 0.5), (4, 3, 0.0), (4, 3, 0.5, 3), (4, 3, 0.5, -1)])
def test_a_schedule_that_cannot_be_is_refused(options):
    with pytest.raises(ValueError, match="RatioSchedule: levels is"):
        RatioSchedule(*options)


def test_one_update_does_not_go_further_than_its_reach_unless_the_budget_wants_it():
    ratios = torch.tensor([[0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
    values = torch.tensor([[0.1, 1.0, 1.0, 10.0]], dtype=torch.float64)
    found = allocate(ratios, values, 0.5, reach=1.25)
    assert found[0, 0] == pytest.approx(0.4) and found[0, 3] == pytest.approx(0.625)
    assert found[0, 1] == found[0, 2] == pytest.approx((2 - 1.025) / 2)
    far = allocate(ratios, values, 0.9, reach=1.25)  # 1.25 times .5 is less
    assert far.mean().item() == pytest.approx(0.9, abs=1e-9) and far[0, 3] == 1
    with pytest.raises(ValueError, match="reach is 1"):
        allocate(ratios, values, 0.5, reach=1)
