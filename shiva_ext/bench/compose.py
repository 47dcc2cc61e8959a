"""``shiva bench compose``: fewer tokens, fewer computed steps, fewer steps, each alone and together."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from ..evaluation.pareto import BETTER, Point, at_cost, compare, front
from ..testbed.cached_rows import Caches
from ..testbed.report import Study
from ..testbed.rows import Row
from ..testbed.sampling import ADAMS, EULER
from .pareto import SAMPLES, sweep
from .pareto_page import COMBINED, points, write_page

STEPS = 25
FEWER = (12, 6, 4)
FEWER_ADAMS = (12, 8, 6, 4)  # of the solver of the second order, which makes more of few steps
# Strengths of the caches by the steps of a run: a short one has few to leave out.
_STRENGTHS = {
    25: {"teacache": (0.4, 0.6), "smoothcache": (0.6, 0.4), "first block": (0.1, 0.25), "fora": (2, 3)},
    12: {"teacache": (0.3, 0.5), "smoothcache": (0.7, 0.5), "first block": (0.2, 0.4)},
    6: {"teacache": (0.3,), "smoothcache": (0.7,), "first block": (0.4,)},
    4: {"teacache": (0.2,), "smoothcache": (0.75,), "first block": (0.4,)},
}
FASTER, WITHIN = 4.0, 1.05  # what is looked for: so much faster, at no more than so much of the dense distance
FEWER_STEPS, GUIDED, TUNED = "fewer steps", "learned guidance", "tuning"
SHIVA = {"fashion": "shiva60", "emoji": "emoji60"}


@dataclass(frozen=True)
class _Model:
    """What stands in the dense model's place.

    Attributes:
        name: in a cell's name; "" for the dense model.
        axes: methods that made it, for the cell's group.
        row: further arguments of its rows.
        control: whether its cells are no method but a control, however few their steps.
    """

    name: str = ""
    axes: tuple[str, ...] = ()
    row: dict = field(default_factory=dict)
    control: bool = False


def _artefact(source: str, **more) -> dict:
    return {"method": "artefact", "source": source, **more}


def _row(model: _Model, cache: tuple[str, float] | None, steps: int, solver: str = EULER) -> Row:
    parts, axes = [model.name] if model.name else [], list(model.axes)
    if cache is not None:
        parts.append(f"{Caches.NAMES[cache[0]]} {cache[1]:g}")
        axes.append(Caches.NAMES[cache[0]])
    if steps != STEPS and not model.control:
        axes.append(FEWER_STEPS)
    parts.append(f"{steps} steps" + ("" if solver == EULER else f" of {solver.title()}"))
    group = COMBINED.join(axes) or "dense"
    text = "dense" if group == "dense" else ", ".join(parts)
    return Row(text, steps=steps, group=group, cache=cache, solver=solver, **model.row)


def _best(model: _Model) -> list[Row]:
    """What was best of each axis on the first testbed."""
    return [_row(model, None, STEPS), _row(model, ("fora", 2), STEPS), *(_row(model, None, n, ADAMS) for n in (12, 6))]


def cells(testbed: str = "fashion") -> list[Row]:
    """The grid: {dense, Shiva 60 %} x {no cache, three caches} x {25, 12, 6, 4 steps}.

    And fewer steps of a solver of the second order, without a cache, whose stale velocities it would continue; both
    models with the guidance learned, for half the calls, without and with the control's tuning added to their weights;
    and the control: the dense model with the same adapters, tuned as long. On the second testbed the best of them that
    need no model of their own.
    """
    dense, shiva = _Model(), _Model("Shiva 60 %", ("Shiva",), _artefact(SHIVA[testbed]))
    if testbed == "emoji":
        return [row for model in (dense, shiva) for row in _best(model)]
    found = []
    for model in (dense, shiva):
        for steps in (STEPS, *FEWER):
            caches = [(cache, each) for cache, strengths in _STRENGTHS[steps].items() for each in strengths]
            found += [_row(model, cache, steps) for cache in (None, *caches)]
        found += [_row(model, None, steps, ADAMS) for steps in FEWER_ADAMS]
    learned = [
        _Model("guidance learned", (GUIDED,), _artefact("dense_guided", guidance=1.0)),
        _Model("Shiva 60 %, guidance learned", ("Shiva", GUIDED), _artefact("guided60", guidance=1.0)),
    ]
    for model in learned:
        found += [_row(model, None, steps) for steps in (STEPS, *FEWER)]
        found += [_row(model, ("fora", 2), STEPS), *(_row(model, None, steps, ADAMS) for steps in FEWER_ADAMS)]
    for model in learned:
        row = model.row | {"options": (("tuned", "dense_finetuned"),)}
        added = _Model(f"{model.name}, tuning added", (*model.axes, TUNED), row)
        found += [_row(added, None, steps, ADAMS) for steps in FEWER_ADAMS]
    tuned = _Model("dense fine-tuned", ("dense fine-tuned",), _artefact("dense_finetuned"), control=True)
    found += [_row(tuned, None, STEPS), *(_row(tuned, None, steps, ADAMS) for steps in FEWER_ADAMS)]
    return found


def is_single(method: str) -> bool:
    """Whether a group of cells is one method alone."""
    return COMBINED not in method


def family(method: str) -> str:
    """A group as it is drawn: whichever cache it has, and however few steps."""
    axes = dict.fromkeys("a cache" if a in Caches.NAMES.values() else a for a in method.split(COMBINED))
    if len(axes) > 1:
        axes.pop(FEWER_STEPS, None)
    return COMBINED.join(axes)


def verdict(found: list[dict]) -> dict:
    """What the grid says: the fastest cells at each quality, and whether the goal is met.

    Returns:
        ``goal`` (text), ``reached`` (names of combinations at least ``FASTER`` times as fast whose distance is at most
        ``WITHIN`` times the dense model's), ``ahead`` (those of them that are better, beyond chance, than the best
        single method of their time), ``front`` (names, by rising time).
    """
    every = points(found, "time")
    dense = next(p for p in every if p.name == "dense")
    single = [p for p in every if is_single(p.method)]
    fast = [
        p for p in every if not is_single(p.method) and 1 / p.cost >= FASTER and p.quality <= WITHIN * dense.quality
    ]
    return {
        "goal": f"a combination at {FASTER:g}x or more, with a distance of at most {WITHIN:g} times the dense model's "
        f"({dense.quality:.3f}), ahead of the best single method of its time",
        "reached": [p.name for p in fast],
        "ahead": [p.name for p in fast if _ahead(p, single)],
        "front": [p.name for p in front(every)],
    }


def _ahead(point: Point, single: list[Point]) -> bool:
    """Whether a point is better than every single method at its time; one that is nowhere as fast is behind."""
    rivals = [at_cost([p for p in single if p.method == name], point.cost) for name in {p.method for p in single}]
    return all(rival is None or compare(point, rival) == BETTER for rival in rivals)


def run(
    samples: int = SAMPLES,
    methods: list[str] | None = None,
    out: str | os.PathLike = "results",
    cache_dir: str | os.PathLike = "build/pareto",
    testbed: str = "fashion",
    seeds: int = 1,
    rows: list[Row] | None = None,
    model_dir: str | os.PathLike | None = None,
    retime: bool = False,
    **settings,
) -> dict:
    """Measure the grid's cells that ``out/compose.json`` does not hold yet, and write it, the page and the pictures.

    Args: as of :func:`~.pareto.run`; ``methods`` are groups such as "Shiva + TeaCache".

    Raises:
        ValueError: an unknown method or testbed.
    """
    study = Study(
        Path(cache_dir), samples, seeds, model_dir, testbed=testbed, **{"steps": STEPS, "timing_repeats": 3} | settings
    )
    suffix = "" if testbed == "fashion" else f"_{testbed}"
    command = f"shiva bench compose --testbed {testbed} --samples {samples}" + (
        f" --seeds {seeds}" if seeds > 1 else ""
    )
    rows = cells(testbed) if rows is None else rows
    found = sweep(study, Path(out) / f"compose{suffix}.json", rows, methods, command, verdict, family, retime)
    write_pages(Path(out))
    return found


def write_pages(out: Path) -> None:
    """Write ``compose.html`` with both testbeds' results, if there are any of both."""
    files = [out / name for name in ("compose.json", "compose_emoji.json")]
    if all(file.is_file() for file in files):
        first, second = (json.loads(file.read_text()) for file in files)
        write_page(first, files[0].with_suffix(".html"), family, [second])
