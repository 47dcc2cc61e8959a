"""Every method at several strengths on a testbed: quality against time and operations, cell by cell."""

import base64
import hashlib
import json
import os
import platform
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from ..evaluation.metrics import bootstrap_distances, ssim
from ..evaluation.pareto import DEVIATIONS
from ..files import write_text
from ..testbed.figures import draw_grid
from ..testbed.report import SHOWN, Study
from ..testbed.rows import Row
from .model_cells import KEPT, MERGED, SDTM_RATIOS, WHOLE, swing
from .pareto_page import COMBINED, OURS, draw, write_page

STEPS = 10
SAMPLES = 1000
# The first block is dense in all mergers, as in Shiva.
_SDTM = {f"{r:g}": {"ratio": r, "swing": swing(r), "first_layer": 1} for r in SDTM_RATIOS}

# Each half of a guided batch keeps its own tokens, not both the same as published: better at every budget here.
_APART = {"batched_guidance": False}
# Shares that the coarse grid lacks; the second is what it was trained with.
_SPARSE = {
    f"{high:g} to {low:g}": {"high": high, "low": low}
    for high, low in ((0.94, 0.8), (0.89, 0.65), (0.8, 0.5), (0.6, 0.3))
}
_LOW_BUDGETS = {"50 %": {}, "45 %": {"budget": 0.45}, "40 %": {"budget": 0.4}, "35 %": {"budget": 0.35}}
_LONGER_BUDGETS = {"50 %": {"budget": 0.5}, "45 %": {}, "40 %": {"budget": 0.4}, "35 %": {"budget": 0.35}}
# What is added to the learned ratios; at 0 it is as it was trained.
_SHIFTS = {f"{each:+g}": {"shift": each} for each in (0.2, 0.1, 0.0, -0.1)}


# With its default, four of ten steps compute both halves of guidance.
_REUSED = ("guidance", 3)
LONGER = f"{OURS}, trained longer"


def _cells(name: str, method: str, source: str, strengths: dict[str, dict], cache=None, **options) -> list[Row]:
    how = dict(group=name, steps=STEPS, cache=cache)
    return [
        Row(f"{name} {text}", method, source, options=tuple({**options, **each}.items()), **how)
        for text, each in strengths.items()
    ]


def _with_guidance_cache(method: str, source: str, name: str, strengths: dict[str, dict], **options) -> list[Row]:
    return _cells(f"{name}{COMBINED}GuidanceCache", method, source, strengths, _REUSED, **options)


def _ratios(*ratios: float) -> dict[str, dict]:
    return {f"{ratio:g}": {"ratio": ratio} for ratio in ratios}


def _thresholds(*values: float) -> dict[str, dict]:
    return {f"{each:g}": {"threshold": each} for each in values}


def _selectors(name: str, source: str, ratios: tuple[float, ...], **options) -> list[Row]:
    return [
        Row(f"{name} {r:g}", "selector", source, r, STEPS, group=name, options=tuple(options.items())) for r in ratios
    ]


def cells(testbed: str = "fashion") -> list[Row]:
    """A testbed's cells; ``group`` is the method, the name's end its strength."""
    if testbed == "emoji":
        return _emoji_cells()
    return [
        Row("dense", steps=STEPS, group="dense"),
        *(Row(f"fewer steps {steps}", steps=steps, group="fewer steps") for steps in (8, 7, 6, 5)),
        Row("dense fine-tuned", "artefact", "dense_finetuned", steps=STEPS, group="dense fine-tuned"),
        *_cells(OURS, "artefact", "shiva80", {"80 %": {}}, **_APART),
        *_cells(OURS, "artefact", "shiva60", {"70 %": {"budget": 0.7}, "60 %": {}}, **_APART),
        *_cells(OURS, "artefact", "shiva50", _LOW_BUDGETS, **_APART),
        *_cells("ToMeSD", "method", "tomesd", _ratios(*MERGED), **WHOLE),
        *_cells("ToFu", "method", "tofu", _ratios(*MERGED), depth=3, **WHOLE),
        *_cells("ToMA", "method", "toma", _ratios(*MERGED)),
        *_cells("IBTM", "method", "ibtm", _ratios(*MERGED), similarity="cosine", **WHOLE),
        *_cells("SDTM", "method", "sdtm", _SDTM),
        *_cells("SparseDiT", "artefact of a method", "sparsedit60", _SPARSE),
        *_cells("DiffCR", "artefact of a method", "diffcr60", _SHIFTS),
        *_cells("DyDiT", "artefact of a method", "dydit60", _thresholds(0.2, 0.5, 0.7, 0.85)),
        *_selectors("random", "random", KEPT),
        *_selectors("random, last value", "random", KEPT, reconstruct="last"),
        *_selectors("random, nearest kept", "random", KEPT, reconstruct="nearest"),
        *_selectors("largest norm", "largest_norm", KEPT),
        # The unprompted half of guidance at some steps only: ours, and what it does to others.
        *_with_guidance_cache("artefact", "shiva80", OURS, {"80 %": {}}, **_APART),
        *_with_guidance_cache("artefact", "shiva60", OURS, {"60 %": {}}, **_APART),
        *_with_guidance_cache("artefact", "shiva50", OURS, {"50 %": {}}, **_APART),
        *_with_guidance_cache("dense", "", "dense", {"10 steps": {}}),
        *_with_guidance_cache("artefact of a method", "diffcr60", "DiffCR", {k: _SHIFTS[k] for k in ("+0.1", "+0")}),
        # Twice the steps: about the time that DiffCR's training takes.
        *_cells(LONGER, "artefact", "shiva60_longer", {"60 %": {}}, **_APART),
        *_cells(LONGER, "artefact", "shiva45_longer", _LONGER_BUDGETS, **_APART),
        *_with_guidance_cache("artefact", "shiva45_longer", LONGER, {"45 %": {}}, **_APART),
        # What the choices are worth, one at a time.
        *_cells("Shiva, one choice for both halves", "artefact", "shiva80", {"80 %": {}}),
        *_cells("Shiva, one choice for both halves", "artefact", "shiva60", {"70 %": {"budget": 0.7}, "60 %": {}}),
        *_cells("Shiva, one choice for both halves", "artefact", "shiva50", {"50 %": {}}),
        *_cells("Shiva, learned schedule", "artefact", "shiva60", {"50 %": {"budget": 0.5}}, **_APART),
        *_cells("Shiva, last value", "artefact", "shiva60", {"60 %": {}, "50 %": {"budget": 0.5}}, reconstruct="last"),
    ]


def _emoji_cells() -> list[Row]:
    """The dense model, ours, and the three rivals without training that were best on the other testbed."""
    budgets = {"80 %": {"budget": 0.8}, "70 %": {"budget": 0.7}, "60 %": {}, "50 %": {"budget": 0.5}}
    return [
        Row("dense", steps=STEPS, group="dense"),
        *(Row(f"fewer steps {steps}", steps=steps, group="fewer steps") for steps in (8, 7, 6, 5)),
        *_cells(OURS, "artefact", "emoji60", budgets, **_APART),
        *_with_guidance_cache("artefact", "emoji60", OURS, budgets, **_APART),
        *_with_guidance_cache("dense", "", "dense", {"10 steps": {}}),
        *_cells("ToMeSD", "method", "tomesd", _ratios(*MERGED), **WHOLE),
        *_cells("IBTM", "method", "ibtm", _ratios(*MERGED), similarity="cosine", **WHOLE),
        *_cells("SDTM", "method", "sdtm", _SDTM),
    ]


def _read(file: Path) -> dict:
    return json.loads(file.read_text()) if file.is_file() else {"cells": {}}


def write_content(file: Path, content: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1)
    numbers = re.compile(r"\[\s+([-\d.e,\s]+?)\s+\]")  # on one line, not a line each
    write_text(file, numbers.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n")


def key(study: Study, row: Row) -> str:
    """A hash of everything that a cell's result depends on."""
    settings = json.dumps(study.settings(row) | {"reference steps": study.steps}, sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()[:20]


def measure(study: Study, row: Row) -> dict:
    """One cell: its metrics with the bootstrap's deviation, its time beside dense, and small pictures.

    Where there are several seeds, distance and resamples are means over them; the rest is the first one's.
    """
    result = study.sample(row, 0)
    images = study.images(row, 0)
    wanted = ("fid", "accuracy", "precision", "recall", "psnr", "foreground_recall", "gflops", "kept_share")
    cell = {"name": row.name, "method": row.group, "steps": row.steps} | {name: result[name] for name in wanted}
    real, resampled = study.bed.statistics, []
    for seed in range(study.seeds):
        features = study.bed.measure(study.images(row, seed))[0]
        labels = study.bed.labels(study.samples)
        resampled.append(bootstrap_distances(features, real["mean"], real["covariance"], seed=seed, labels=labels))
    draws = [statistics.fmean(each) for each in zip(*resampled, strict=True)]
    cell["fid_seeds"] = [study.sample(row, seed)["fid"] for seed in range(study.seeds)]
    cell["fid"] = statistics.fmean(cell["fid_seeds"])
    cell |= {"fid_error": DEVIATIONS * statistics.stdev(draws), "fid_draws": [round(each, 4) for each in draws]}
    cell["ssim"] = ssim(images, study.images(study.dense, 0)).mean().item()
    cell |= times(study, row)
    strip = study.cache_dir / "strip.png"
    draw_grid(images, strip, SHOWN)
    kept = study.kept_picture(row, 0)
    cell["strip"] = base64.b64encode(strip.read_bytes()).decode()
    cell["kept"] = base64.b64encode(kept.read_bytes()).decode() if kept.is_file() else None
    return cell


def times(study: Study, row: Row) -> dict:
    """The part of a cell that is its time."""
    timing = study.timing(row)
    ratios = [dense / mine for dense, mine in timing["pairs"]]
    found = {name: timing[name] for name in ("speed_up", "seconds", "dense_seconds")}
    return found | {"speed_up_range": [min(ratios), max(ratios)], "machine": _machine()}


def _machine() -> str:
    """What a cell's time was taken on; cells of several machines can meet in one file."""
    threads = f"{torch.get_num_threads()} threads"
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {threads}, torch {torch.__version__}"


def run(
    samples: int = SAMPLES,
    methods: list[str] | None = None,
    out: str | os.PathLike = "results",
    cache_dir: str | os.PathLike = "build/pareto",
    model_dir: str | os.PathLike | None = None,
    rows: list[Row] | None = None,
    testbed: str = "fashion",
    seeds: int = 1,
    retime: bool = False,
    **settings,
) -> dict:
    """Measure the cells that ``out/pareto.json`` does not hold yet, and write it, the page and the pictures.

    The second testbed's are ``pareto_emoji.json`` and so on.

    Args:
        samples: images a cell.
        methods: names, as in the first column of the table; the dense model always runs. By default all.
        out: folder of ``pareto.json``, ``pareto.html`` and ``pareto.png``.
        cache_dir: of images.
        model_dir: dense model; by default the testbed's.
        rows: cells; by default :func:`cells`.
        testbed: "fashion" or "emoji".
        seeds: of the noise. Cells of fewer are measured again, those of more stay: give two methods that are close
            some more.
        retime: time the cells again that are there, all in one sitting.
        settings: further settings of :class:`Study`.

    Raises:
        ValueError: an unknown method.
    """
    rows = cells(testbed) if rows is None else rows
    study = Study(
        Path(cache_dir), samples, seeds, model_dir, testbed=testbed, **{"steps": STEPS, "timing_repeats": 3} | settings
    )
    name = "pareto.json" if testbed == "fashion" else f"pareto_{testbed}.json"
    command = f"shiva bench pareto --testbed {testbed} --samples {samples}" + (f" --seeds {seeds}" if seeds > 1 else "")
    return sweep(study, Path(out) / name, rows, methods, command, retime=retime)


def sweep(
    study: Study,
    file: Path,
    rows: list[Row],
    methods: list[str] | None,
    command: str,
    verdict: Callable[[list[dict]], dict] | None = None,
    family: Callable[[str], str] = str,
    retime: bool = False,
) -> dict:
    """Measure the rows that a file does not hold yet, and write it, its page and its picture.

    Args:
        methods: groups of the rows; by default all. The dense model always runs.
        command: that does this.
        verdict: what the cells say together, in place of the duels of "Shiva" with each rival.
        family: the name under which a group is drawn; several groups may share one.
        retime: time the cells again that are there.

    Raises:
        ValueError: an unknown method.
    """
    known = list(dict.fromkeys(row.group for row in rows))
    unknown = [name for name in methods or [] if name not in known]
    if unknown:
        raise ValueError(
            f"{' '.join(command.split()[:3])}: unknown method {unknown[0]!r}; wanted some of "
            f"{', '.join(map(repr, known))}"
        )
    content = _read(file)
    wanted = [row for row in rows if not methods or row.group in methods or row.group == "dense"]
    done = {name for name, cell in content["cells"].items() if len(cell.get("fid_seeds", [])) >= study.seeds}
    missing = [row for row in wanted if key(study, row) not in done]
    held = [row for row in wanted if retime and row not in missing]
    for row in missing:
        for seed in range(study.seeds):
            study.sample(row, seed)
    study.timings(held + missing, again=retime)
    for row in held:
        content["cells"][key(study, row)] |= times(study, row)
    for row in missing:
        content["cells"][key(study, row)] = measure(study, row)
        write_content(file, content)
    keys = [key(study, row) for row in rows if key(study, row) in content["cells"]]
    content = {
        "command": command,
        "testbed": study.testbed,
        "samples": study.samples,
        "steps": study.steps,
        "guidance": study.guidance,
        "cells": {each: content["cells"][each] for each in keys},
    }
    found = list(content["cells"].values())
    content["noise"] = timing_noise(found)
    if verdict is not None:
        content["verdict"] = verdict(found)
    write_content(file, content)
    draw(found, file.with_suffix(".png"), family)
    write_page(content, file.with_suffix(".html"), family)
    return content


def timing_noise(found: list[dict]) -> float | None:
    """The machine's noise: the median over cells of the spread of a cell's pairs, as a share of its speed-up."""
    spreads = [(c["speed_up_range"][1] - c["speed_up_range"][0]) / c["speed_up"] for c in found if c["name"] != "dense"]
    return statistics.median(spreads) if spreads else None
