"""SmoothCache's schedules: from the errors of reusing an output k steps later to which steps compute."""

from collections.abc import Sequence

Rows = dict[int, Sequence[float]]  # by lag k: the error at i is that between steps i and i + k


def make_schedule(rows: Rows, alpha: float, steps: int, between: bool = False) -> tuple[int, ...]:
    """Which of the steps compute (1) and which reuse (0), for one type of module.

    SmoothCache (arXiv 2411.10510, section 2, as in the published code): from a computed step go as far as the largest
    lag whose error is at most ``alpha``, and compute again. The first and the last step compute.

    Args:
        rows: errors by lag 1 to K; row k has ``steps - k`` of them.
        alpha: largest error; 0 or more.
        steps: of a run.
        between: test the errors of all steps that would reuse, and not the last one's alone; for curves that fall
            again.

    Raises:
        ValueError: an argument is out of range, or a row too long.
    """
    if steps < 1 or not alpha >= 0:
        raise ValueError(f"make_schedule: steps is {steps} and alpha {alpha}, wanted at least 1 and 0")
    for lag, row in rows.items():
        if lag < 1 or len(row) > max(steps - lag, 0):
            raise ValueError(
                f"make_schedule: row {lag} has {len(row)} errors, wanted at most {steps - lag} for {steps} steps"
            )

    def fits(step: int, lag: int) -> bool:
        tested = range(1, lag + 1) if between else (lag,)
        return all(k in rows and step < len(rows[k]) and rows[k][step] <= alpha for k in tested)

    found, step = [0] * steps, 0
    while step < steps:
        found[step] = 1
        step += 1 + next((lag for lag in sorted(rows, reverse=True) if fits(step, lag)), 0)
    found[-1] = 1
    return tuple(found)


def every(interval: int, steps: int) -> tuple[int, ...]:
    """FORA's schedule (arXiv 2407.01425): steps 0, n, 2n, ... and the last compute.

    Raises:
        ValueError: interval or steps is below 1.
    """
    if interval < 1 or steps < 1:
        raise ValueError(f"every: interval is {interval} and steps {steps}, wanted at least 1")
    return tuple(int(step % interval == 0 or step == steps - 1) for step in range(steps))
