"""Which methods are worth their time: the front of quality against cost, with its uncertainty."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

DEVIATIONS = 1.96  # half a 95 % interval

BETTER, TIE, WORSE = "better", "tie", "worse"


@dataclass(frozen=True)
class Point:
    """A method at one strength.

    Attributes:
        name: of the point.
        method: points of one method make a curve.
        cost: seconds or operations, less is better.
        quality: a distance, less is better.
        error: half the width of its confidence interval.
        draws: its quality in resamples, which are the same for all points that have any; or empty.
    """

    name: str
    method: str
    cost: float
    quality: float
    error: float = 0.0
    draws: tuple[float, ...] = ()

    @property
    def low(self) -> float:
        return self.quality - self.error

    @property
    def high(self) -> float:
        return self.quality + self.error


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats, by rising cost.

    One beats another that costs as much or more and is as far or farther, unless they are equal in both.
    """

    def beaten(point: Point) -> bool:
        return any(
            other.cost <= point.cost
            and other.quality <= point.quality
            and (other.cost, other.quality) != (point.cost, point.quality)
            for other in points
        )

    return sorted((p for p in points if not beaten(p)), key=lambda p: (p.cost, p.quality))


def ties(points: Sequence[Point]) -> list[Point]:
    """Points off the front whose interval overlaps that of the best point of at most their cost."""
    best = front(points)
    found = []
    for point in points:
        if point not in best:
            affordable = min((p for p in best if p.cost <= point.cost), key=lambda p: p.quality)
            if point.low <= affordable.high:
                found.append(point)
    return found


def at_cost(points: Sequence[Point], cost: float) -> Point | None:
    """One method's quality and error at a cost between its points, interpolated on its own front.

    None below its cheapest point; beyond its dearest it stays at the best there is.
    """
    own = front(points)
    if not own or cost < own[0].cost:
        return None
    for cheap, dear in zip(own, own[1:], strict=False):
        if cheap.cost <= cost < dear.cost:
            share = (cost - cheap.cost) / (dear.cost - cheap.cost)

            def between(name: str, a=cheap, b=dear, share=share) -> float:
                return (1 - share) * getattr(a, name) + share * getattr(b, name)

            draws = tuple((1 - share) * a + share * b for a, b in zip(cheap.draws, dear.draws, strict=False))
            name = f"between {cheap.name} and {dear.name}"
            return Point(name, cheap.method, cost, between("quality"), between("error"), draws)
    return own[-1]


def compare(mine: Point, other: Point) -> str:
    """Whether a point is better than another, worse, or neither for sure.

    Where both were resampled together it is the interval of their difference that must leave out 0: what both owe to
    the same noise and the same few samples does not count. Else their intervals must not overlap.
    """
    difference = mine.quality - other.quality
    if mine.draws and len(mine.draws) == len(other.draws):
        error = DEVIATIONS * statistics.stdev(a - b for a, b in zip(mine.draws, other.draws, strict=True))
    else:
        error = mine.error + other.error
    if abs(difference) <= error:
        return TIE
    return BETTER if difference < 0 else WORSE


def verdicts(ours: Sequence[Point], rival: Sequence[Point]) -> list[tuple[Point, str | None]]:
    """How we stand at the cost of each of a rival's points.

    Returns:
        (point, verdict), by rising cost, as :func:`compare` has it; None where we have no point that is as cheap.
    """
    found = []
    for point in sorted(rival, key=lambda p: p.cost):
        mine = at_cost(ours, point.cost)
        found.append((point, None if mine is None else compare(mine, point)))
    return found
