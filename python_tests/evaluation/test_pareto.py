"""Fronts, ties and duels on points whose outcome is known."""

import random

import pytest

from shiva_ext.evaluation.pareto import Point, at_cost, front, ties, verdicts


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
