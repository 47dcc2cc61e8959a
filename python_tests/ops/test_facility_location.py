"""facility_location beyond the matrix: how good the choice is, ties, bad values, many steps."""

import math

import pytest
import torch
from torch.nn import functional as F

from shiva_ext import ops, reference

from . import simulated
from .device import place


def choose(similarity: torch.Tensor, count: int) -> torch.Tensor:
    return ops.facility_location(place(similarity), count).cpu()


def cosines(B: int, n: int, C: int, seed: int = 0) -> torch.Tensor:
    unit = F.normalize(torch.randn(B, n, C, generator=torch.Generator().manual_seed(seed)), dim=-1)
    return unit @ unit.transpose(1, 2)


@pytest.mark.parametrize("n", [4, 8])
def test_the_choice_is_best_for_one_and_good_for_more(n):
    S = cosines(20, n, 5)
    best = S.sum(dim=1).argmax(dim=-1)  # one column stands for all
    assert torch.equal(choose(S, 1)[:, 0], best)
    S = S.clamp_min(0)  # the bound is for gains from nothing
    for count in (2, 3):
        combinations = torch.combinations(torch.arange(n), count)
        optimum = S[:, :, combinations].amax(dim=-1).sum(dim=1).amax(dim=-1)
        chosen = choose(S, count)
        value = S.gather(2, chosen[:, None].expand(-1, n, -1)).amax(dim=-1).sum(dim=1)
        assert (value >= (1 - 1 / math.e) * optimum - 1e-5).all()
        assert (chosen.diff(dim=-1) > 0).all()


# More than 32 are chosen lazily on the CPU, where an old gain must still be a bound.
@pytest.mark.parametrize(("n", "count"), [(16, 8), (32, 20), (33, 20), (64, 32), (256, 128), (257, 40), (400, 390)])
@pytest.mark.parametrize("kind", ["cosines", "rounded", "one cluster"])
def test_many_steps_equal_the_reference(kind, n, count):
    S = cosines(2, n, 6, seed=n)
    if kind == "rounded":
        S = S.bfloat16()
    if kind == "one cluster":  # gains differ in their last digits only
        S = 1 - 1e-6 * (1 - S)
    if simulated.VARIANT:
        count = min(count, 3)
    assert torch.equal(choose(S, count), reference.facility_location(S, count))


def test_equal_columns_are_taken_from_the_first_on():
    assert choose(torch.ones(2, 6, 6), 6).tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    S = cosines(1, 40, 3)
    twice = torch.cat([S, S], dim=2)
    assert choose(torch.cat([twice, twice], dim=1), 1).item() < 40
    assert choose(torch.full((1, 70, 70), 0.1), 3).tolist() == [[0, 1, 2]]


def test_the_rows_are_covered_and_the_columns_chosen():
    S = torch.zeros(1, 3, 3)
    S[0, :, 2] = 1.0  # token 2 stands for all
    assert choose(S, 1).tolist() == [[2]] and choose(S.transpose(1, 2), 1).tolist() == [[0]]


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("n", [5, 40, 300])
def test_bad_values_are_chosen_as_by_the_reference(n, bad):
    S = cosines(1, n, 4)
    S[0, 1, 3] = S[0, 1, 2] = S[0, n - 1, 0] = bad
    for count in (1, 2, 4) if simulated.VARIANT else (1, 2, 4, n - 1):
        assert torch.equal(choose(S, count), reference.facility_location(S, count))
    if math.isnan(bad) or bad == math.inf:
        assert choose(S, 1).tolist() == [[0]]  # a NaN or infinite gain is largest, and the first of them taken


@pytest.mark.parametrize("n", [0, 1, 7, 300])
def test_all_and_none_may_be_chosen(n):
    assert choose(torch.zeros(2, n, n), 0).shape == (2, 0)
    if n < 300 or not simulated.VARIANT:
        assert choose(cosines(2, n, 3) if n else torch.zeros(2, 0, 0), n).tolist() == [list(range(n))] * 2
    assert choose(torch.zeros(0, n, n), min(n, 1)).shape == (0, min(n, 1))
