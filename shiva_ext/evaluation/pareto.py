"""Which methods are worth their time: the front of quality against cost, with its uncertainty."""

from collections.abc import Sequence
from dataclasses import dataclass

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
    """

    name: str
    method: str
    cost: float
    quality: float
    error: float = 0.0

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

            return Point(
                f"between {cheap.name} and {dear.name}", cheap.method, cost, between("quality"), between("error")
            )
    return own[-1]


def verdicts(ours: Sequence[Point], rival: Sequence[Point]) -> list[tuple[Point, str | None]]:
    """How we stand at the cost of each of a rival's points.

    Returns:
        (point, verdict), by rising cost: "better" or "worse" where the intervals do not overlap, else "tie"; None where
        we have no point that is as cheap.
    """
    found = []
    for point in sorted(rival, key=lambda p: p.cost):
        mine = at_cost(ours, point.cost)
        if mine is None:
            verdict = None
        elif mine.high < point.low:
            verdict = BETTER
        elif mine.low > point.high:
            verdict = WORSE
        else:
            verdict = TIE
        found.append((point, verdict))
    return found
