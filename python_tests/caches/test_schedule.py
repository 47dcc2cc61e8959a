"""Schedules from errors, and FORA's."""

import pytest

from shiva_ext.caches import every, make_schedule


def test_the_rule_on_a_worked_example():
    rows = {1: [0.05, 0.05, 0.2, 0.05, 0.05, 0.05, 0.05, 0.2, 0.05], 2: [0.1, 0.3, 0.3, 0.1, 0.1, 0.1, 0.3, 0.3]}
    rows[3] = [0.3] * 7
    assert make_schedule(rows, 0.12, 10) == (1, 0, 0, 1, 0, 0, 1, 0, 1, 1)


def curves(schedule, max_lag: int = 3):
    """Errors whose rule gives a schedule: small as far as it reuses, large elsewhere."""
    steps, rows = len(schedule), {}
    for lag in range(1, max_lag + 1):
        rows[lag] = [0.1 if schedule[i] and not any(schedule[i + 1 : i + lag + 1]) else 0.9 for i in range(steps - lag)]
    return rows


def fifty_low():
    return [0 if i in (1, 2, 4, 6) else 1 for i in range(50)]


def fifty_mid():
    return [1, 0, 0, 0, 1, 0, 0, 1, 0, 0] + [1, 0] * 19 + [1, 1]


@pytest.mark.parametrize(("schedule", "share"), [(fifty_low(), 0.920), (fifty_mid(), 0.480)])
def test_the_published_schedules_of_fifty_steps(schedule, share):
    found = make_schedule(curves(schedule), 0.2, 50)
    assert list(found) == schedule and sum(found) / 50 == pytest.approx(share, abs=5e-4)


@pytest.mark.parametrize(("steps", "interval", "computed"), [(50, 2, 26), (30, 2, 16), (70, 2, 36), (50, 3, 18)])
def test_fora_computes_as_often_as_published(steps, interval, computed):
    schedule = every(interval, steps)
    assert sum(schedule) == computed and schedule[0] == schedule[-1] == 1


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_alpha_zero_computes_always_and_infinity_as_little_as_the_lags_let(steps):
    rows = {k: [0.3] * max(steps - k, 0) for k in (1, 2, 3)}
    assert make_schedule(rows, 0.0, steps) == (1,) * steps
    found = make_schedule(rows, float("inf"), steps)
    assert found == tuple(int(i % 4 == 0 or i == steps - 1) for i in range(steps))


def test_errors_between_are_tested_where_asked():
    rows = {1: [0.9, 0.9, 0.9], 2: [0.1, 0.1]}
    assert make_schedule(rows, 0.2, 4) == (1, 0, 0, 1)
    assert make_schedule(rows, 0.2, 4, between=True) == (1, 1, 1, 1)


def test_no_rows_and_nan_compute():
    assert make_schedule({}, 1.0, 3) == (1, 1, 1)
    assert make_schedule({1: [float("nan")] * 2}, 1.0, 3) == (1, 1, 1)


@pytest.mark.parametrize(
    ("rows", "alpha", "steps"), [({1: [0.1]}, 0.1, 0), ({1: [0.1]}, -1, 3), ({1: [0.1] * 3}, 0.1, 3), ({0: []}, 0.1, 3)]
)
def test_wrong_arguments_are_refused(rows, alpha, steps):
    with pytest.raises(ValueError, match="make_schedule"):
        make_schedule(rows, alpha, steps)


def test_wrong_intervals_are_refused():
    with pytest.raises(ValueError, match="interval is 0"):
        every(0, 5)
