"""The cells of a sweep over one's own checkpoint: which methods, at which strengths."""

from dataclasses import dataclass

from .. import methods
from ..selection import RandomSelector
from .pareto_page import OURS, REFERENCE

ARTEFACT, MERGER, RANDOM = "artefact", "merger", "random"
BUDGETS = (0.8, 0.7, 0.6, 0.5)  # mean share of the tokens that the artefact keeps
KEPT = (0.9, 0.8, 0.7, 0.6)
MERGED = (0.1, 0.25, 0.4, 0.5)
SDTM_RATIOS = (0.15, 0.3, 0.45, 0.6)
FEWER = (0.8, 0.7, 0.6, 0.5)  # share of the steps
# Around whole blocks, the first of them dense: it saves the most, and works for every family whose grid is known.
WHOLE = {"sites": ("block",), "first_layer": 1}


def swing(ratio: float) -> float:
    """SDTM's setting of this name for a ratio."""
    return min(0.2, ratio / 2)


@dataclass(frozen=True)
class Cell:
    """One method at one strength.

    Attributes:
        name: of the cell.
        method: cells of one method make a curve.
        steps: of the sampler.
        kind: how the pipeline is changed: "dense", :data:`ARTEFACT`, :data:`MERGER` or :data:`RANDOM`.
        options: settings, as pairs of a name and a value.
    """

    name: str
    method: str
    steps: int
    kind: str = "dense"
    options: tuple[tuple[str, object], ...] = ()

    def source(self, artefact):
        """What :func:`shiva_ext.enable` is given, and its further arguments; the folder of the artefact is given."""
        options = dict(self.options)
        if self.kind == ARTEFACT:
            return artefact, options
        if self.kind == RANDOM:
            return RandomSelector(**options), {}
        return methods.METHODS[self.method.lower()](**options), {}


def cells(steps: int, layers: int, artefact: bool) -> list[Cell]:
    """All cells for a sampler of so many steps and a model of so many blocks; the dense model comes first.

    Those of Shiva are there if there is an artefact.
    """
    found = [Cell("dense", REFERENCE, steps)]
    fewer = {max(1, round(share * steps)) for share in FEWER} - {steps}
    found += [Cell(f"fewer steps {n}", "fewer steps", n) for n in sorted(fewer, reverse=True)]
    if artefact:
        found += [Cell(f"{OURS} {b * 100:.0f} %", OURS, steps, ARTEFACT, (("budget", b),)) for b in BUDGETS]

    def merger(name: str, ratio: float, **options) -> Cell:
        return Cell(f"{name} {ratio:g}", name, steps, MERGER, tuple(({"ratio": ratio} | options).items()))

    found += [merger("ToMeSD", r, **WHOLE) for r in MERGED]
    found += [merger("ToFu", r, depth=layers // 2, **WHOLE) for r in MERGED]
    found += [merger("ToMA", r) for r in MERGED]
    found += [merger("IBTM", r, similarity="cosine", **WHOLE) for r in MERGED]
    found += [merger("SDTM", r, swing=swing(r), first_layer=1) for r in SDTM_RATIOS]
    return found + [Cell(f"random {r:g}", "random", steps, RANDOM, (("ratio", r),)) for r in KEPT]


def chosen(found: list[Cell], names: list[str] | None) -> list[Cell]:
    """The cells of some methods, and the dense model.

    Raises:
        ValueError: an unknown method.
    """
    known = list(dict.fromkeys(cell.method for cell in found))
    for name in names or []:
        if name not in known:
            raise ValueError(
                f"shiva bench pareto: unknown method {name!r}; wanted some of {', '.join(map(repr, known))}"
                + ("" if OURS in known else f"; {OURS!r} needs --artefact FOLDER")
            )
    return [cell for cell in found if not names or cell.method in (*names, REFERENCE)]


PROMPTS = (
    "a red bicycle leaning against a white wall",
    "a bowl of ramen with a boiled egg, seen from above",
    "a lighthouse on a cliff during a storm",
    "portrait of an old fisherman with a grey beard",
    "two cats sleeping on a green sofa",
    "a wooden sign that says OPEN above a bakery door",
    "a glass of water on a table, sunlight through a window",
    "an astronaut riding a horse in a desert",
    "a street market at night with many paper lanterns",
    "a snowy owl in flight over a pine forest",
    "three blue balls and one yellow cube on a wooden floor",
    "an oil painting of a harbour with sailing boats",
    "a steam locomotive crossing a stone bridge",
    "close-up of a dew drop on a leaf",
    "a library with shelves up to the ceiling and a ladder",
    "a child flying a kite on a beach, watercolour",
)
