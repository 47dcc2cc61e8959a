"""Fronts, ties and duels on points whose outcome is known."""

import random

import pytest

from shiva_ext.evaluation.pareto import Point, at_cost, compare, front, ties, verdicts


def points(*pairs, method="m", error=0.0):
    return [Point(f"{method}{i}", method, cost, quality, error) for i, (cost, quality) in enumerate(pairs)]


def test_a_dominated_point_is_never_on_the_front():
    found = points((1, 5), (2, 3), (2, 4), (3, 3), (4, 1), (5, 2))
    assert [(p.cost, p.quality) for p in front(found)] == [(1, 5), (2, 3), (4, 1)]


def test_equal_points_are_both_on_it_and_one_point_is_its_own_front():
    twice = points((1, 2), (1, 2))
    assert front(twice) == twice
    assert front(twice[:1]) == twice[:1] and front([]) == []


def test_front_against_a_definition_on_random_points():
    draw = random.Random(0)
    for _ in range(50):
        found = points(*((draw.randint(0, 6), draw.randint(0, 6)) for _ in range(8)))
        best = front(found)
        for p in found:
            better = [q for q in found if q.cost <= p.cost and q.quality <= p.quality]
            strictly = [q for q in better if q.cost < p.cost or q.quality < p.quality]
            assert (p in best) == (not strictly)
        assert [p.cost for p in best] == sorted(p.cost for p in best)


def test_overlapping_intervals_are_ties_and_others_are_not():
    good = Point("good", "a", 1, 10, 1.0)
    close, far, dear = Point("close", "b", 1.5, 12, 1.0), Point("far", "b", 1.5, 12.1, 1.0), Point("dear", "c", 3, 10.5)
    assert ties([good, close, far, dear]) == [close, dear]


def test_interpolation_is_on_ones_own_front():
    own = points((1, 10), (2, 20), (3, 4), error=1.0)  # the second is beaten by the first
    assert at_cost(own, 0.9) is None
    assert at_cost(own, 2).quality == pytest.approx(7) and at_cost(own, 2).error == 1.0
    assert at_cost(own, 3).quality == at_cost(own, 99).quality == 4
    assert at_cost([], 1) is None


def test_verdicts_at_equal_cost():
    ours = points((1, 10), (2, 6), error=1.0)
    rival = points((0.5, 50), (1, 15), (1.5, 9.9), (2, 3), (9, 4.1), method="r", error=1.0)
    assert [verdict for _, verdict in verdicts(ours, rival)] == [None, "better", "tie", "worse", "tie"]


def test_what_was_resampled_together_is_compared_by_its_difference():
    """A large spread that two points share hides nothing; one of their own does."""
    noise = [((-1) ** i) * 3.0 for i in range(100)]
    own = [((-1) ** (i // 2)) * 0.5 for i in range(100)]  # uncorrelated with the noise
    mine = Point("mine", "a", 1, 10.0, 5.9, tuple(10 + n for n in noise))
    close = Point("close", "b", 1, 10.9, 5.9, tuple(10.9 + n + o for n, o in zip(noise, own, strict=True)))
    far = Point("far", "b", 1, 11.1, 5.9, tuple(11.1 + n + o for n, o in zip(noise, own, strict=True)))
    assert [compare(mine, point) for point in (close, far)] == ["tie", "better"]  # 1.96 x 0.5025 = .985
    assert compare(far, mine) == "worse"
    alone = Point("alone", "b", 1, 11.1, 5.9)
    assert compare(mine, alone) == "tie" and compare(mine, Point("x", "b", 1, 22.0, 5.9)) == "better"


def test_interpolation_takes_the_resamples_along():
    own = [Point("a", "m", 1, 10, 1, (9.0, 11.0)), Point("b", "m", 3, 4, 1, (5.0, 3.0))]
    assert at_cost(own, 2).draws == (7.0, 7.0)
