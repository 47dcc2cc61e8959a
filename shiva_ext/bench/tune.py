"""``shiva tune``: the selection, cache and number of steps for one's own checkpoint that are worth it together."""

import inspect
import itertools
import json
import math
import os
import statistics
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from ..api import enable
from ..caches.calibrate import calibrate_smoothcache, calibrate_teacache
from ..caches.file import read_cache, save_cache
from ..configuration import Configuration
from ..evaluation.image_metric import fingerprint, read_picture
from ..evaluation.metrics import ssim
from ..testbed.beds import TESTBEDS, get_testbed
from ..testbed.model import ASSETS
from ..testbed.pipeline import TestbedPipeline
from ..testbed.rows import Dense
from ..training.fit import load_pipeline
from .compose import SHIVA
from .compose import STEPS as TESTBED_STEPS
from .model_cells import BUDGETS, Cell
from .model_study import ModelStudy, hash_of, write_json
from .pareto_model import DTYPES, read_prompts

KIND = "configuration"
# What each axis is tried at. Shares of the calls that TeaCache reuses, and of the steps that SmoothCache computes.
CACHES = (
    *(("fora", 2), ("fora", 3), ("smoothcache", 0.7), ("smoothcache", 0.5), ("teacache", 0.3), ("teacache", 0.5)),
    *(("guidance", 2), ("guidance", 3)),
)
STEP_SHARES = (0.8, 0.6, 0.5, 0.4)
MEASURED = 8  # combinations that are measured
BOUND = 0.8  # least mean SSIM to the dense pictures


@dataclass(frozen=True)
class Trial:
    """A configuration and what is known of it.

    Attributes:
        cell: the configuration, as options of a cell.
        speed_up: over the dense model with all steps.
        fidelity: mean SSIM to its pictures.
    """

    cell: Cell
    speed_up: float
    fidelity: float


def cell_of(steps: int, budget: float | None = None, cache: tuple[str, float] | None = None) -> Cell:
    """A cell of one combination; None leaves an axis out."""
    parts = [f"Shiva {budget:.0%}"] if budget is not None else []
    parts += [f"{cache[0]} {cache[1]:g}"] if cache is not None else []
    name = ", ".join([*parts, f"{steps} steps"])
    return Cell(name, KIND, steps, KIND, (("budget", budget), ("cache", cache)))


class TuneStudy(ModelStudy):
    """A study whose cells have a selection, a cache, or both."""

    def settings(self, cell: Cell) -> dict:
        options = dict(cell.options)
        return super().settings(cell) | ({"artefact": self._artefact} if options.get("budget") is not None else {})

    def calibration(self, name: str, strength: float, steps: int):
        """Of the dense model, from the study's first prompts; kept on disk."""
        what = {key: value for key, value in super().settings(cell_of(steps)).items() if key != "options"}
        file = self.cache_dir / f"calibration-{name}-{hash_of([what, name, strength, self.samples])}.json"
        if not file.is_file():
            calibrate = {"teacache": calibrate_teacache, "smoothcache": calibrate_smoothcache}[name]

            def run() -> None:
                for i in tqdm(range(self.samples), desc=f"{name}, {steps} steps, calibration", mininterval=2):
                    self.generate(range(i, i + 1), steps)

            save_cache(calibrate(self.pipe, run, share=strength, batched_guidance=self.guided), file)
        return read_cache(file)

    def configuration(self, cell: Cell) -> Configuration:
        """What a cell stands for."""
        options = dict(cell.options)
        cache, budget = options["cache"], options["budget"]
        own = str(Path(self.artefact).resolve()) if self.artefact and Path(self.artefact).is_dir() else self.artefact
        found = Configuration(cell.steps, None if budget is None else own, budget)
        if cache is None:
            return found
        name, strength = cache
        if name in ("teacache", "smoothcache"):
            return replace(found, cache=name, calibration=self.calibration(name, strength, cell.steps))
        return replace(found, cache=name, strength=strength)

    @contextmanager
    def enabled(self, cell: Cell):
        configuration = self.configuration(cell)
        if configuration.selection is None and configuration.cache is None:
            yield Dense()
            return
        with enable(self.pipe, configuration, batched_guidance=self.guided):
            yield Dense()  # nothing is recorded


def _fidelity(study: TuneStudy, cell: Cell, dense: Cell) -> float:
    pairs = zip(study.pictures(cell), study.pictures(dense), strict=True)
    found = [ssim(*(read_picture(file)[None] / 127.5 - 1 for file in pair)).mean().item() for pair in pairs]
    return statistics.fmean(found)


def _tried(study: TuneStudy, cell: Cell, dense: Cell) -> Trial | None:
    """A cell's numbers; None where the cache has nothing to do in so few steps, or the model refuses it."""
    file = study.cache_dir / f"left-out-{hash_of([study.settings(cell), study.samples])}.json"
    try:
        if file.is_file():
            raise ValueError(json.loads(file.read_text()))
        fidelity = _fidelity(study, cell, dense)
    except (TypeError, ValueError) as error:
        write_json(file, str(error))
        print(f"shiva tune: {cell.name} is left out: {error}")
        return None
    return Trial(cell, study.timing(cell, dense)["speed_up"], fidelity)


def candidates(alone: dict[str, list[Trial]], budget: float) -> list[tuple[Trial, ...]]:
    """Combinations of at most one trial an axis, the most promising first.

    Speed-ups are taken to multiply and losses of fidelity to add up, which only says what is worth measuring.

    Args:
        alone: what each axis does alone.
        budget: speed-up that is wanted.
    """
    choices = [[None, *trials] for trials in alone.values()]
    found = [tuple(each for each in some if each is not None) for some in itertools.product(*choices)]
    found = [some for some in found if len(some) > 1]

    def promise(some: tuple[Trial, ...]) -> tuple[float, float]:
        speed_up = math.prod(each.speed_up for each in some)
        loss = sum(1 - each.fidelity for each in some)
        return max(0.0, budget - speed_up), loss

    return sorted(found, key=promise)


def choose(trials: list[Trial], budget: float | None, bound: float) -> Trial:
    """The fastest trial within the bound; with a budget, the most faithful of those that are as fast.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    within = [each for each in trials if each.fidelity >= bound and (budget is None or each.speed_up >= budget)]
    if within:
        return max(within, key=lambda each: each.speed_up if budget is None else each.fidelity)
    listed = ", ".join(
        f"{each.cell.name} ({each.speed_up:.2f}x, SSIM {each.fidelity:.3f})"
        for each in sorted(trials, key=lambda each: -each.fidelity)[:3]
    )
    wanted = f"SSIM to dense of at least {bound:g}" + ("" if budget is None else f" at {budget:g}x or more")
    raise ValueError(f"shiva tune: nothing that was measured has an {wanted}; the most faithful: {listed}")


def run(
    model: str,
    out: str | os.PathLike,
    budget: float | None = None,
    bound: float = BOUND,
    artefact: str | None = None,
    prompts: str | os.PathLike | None = None,
    samples: int = 8,
    steps: int | None = None,
    guidance: float | None = None,
    size: int | None = None,
    revision: str | None = None,
    dtype: str = "bfloat16",
    device: str | None = None,
    measured: int = MEASURED,
    seed: int = 0,
    cache_dir: str | os.PathLike = "build/tune",
    timing_repeats: int = 3,
) -> Configuration:
    """Find the fastest configuration of a pipeline within a quality bound, or the best one at a speed-up.

    First each axis alone (selection, cache, number of steps), then the combinations that promise most. Every picture,
    number and calibration is kept under ``cache_dir``: a run that was stopped goes on.

    Args:
        model: folder of a diffusers pipeline, a hub id with its ``revision``, or a testbed: "fashion", "emoji".
        out: JSON file for :func:`shiva_ext.enable`.
        budget: wanted speed-up over the dense pipeline with all steps; by default as much as the bound lets.
        bound: least mean SSIM to the dense pipeline's pictures.
        artefact: a trained selection, if there is one.
        prompts, samples: file with a prompt a line, and how many pictures are compared.
        steps, guidance, size: of the sampler; by default the pipeline's own. A testbed
            has its own, as prompts and artefact.
        measured: how many combinations to measure.
        dtype, device, seed, cache_dir, timing_repeats: as for ``shiva bench pareto --model``.

    Raises:
        FileNotFoundError, ValueError: an argument is wrong, or nothing reaches the bound.
    """
    if budget is not None and not budget > 1:
        raise ValueError(f"shiva tune: budget is {budget:g}x, wanted more than 1")
    if not 0 < bound <= 1:
        raise ValueError(f"shiva tune: bound is {bound:g}, wanted a similarity in (0, 1]")
    if dtype not in DTYPES:
        raise ValueError(f"shiva tune: dtype is {dtype!r}, wanted one of {', '.join(DTYPES)}")
    if samples < 1 or measured < 0 or (steps is not None and steps < 2):
        raise ValueError("shiva tune: samples is at least 1, measured at least 0, steps at least 2")
    if Path(out).suffix != ".json":
        raise ValueError(f"shiva tune: out is {str(out)!r}, wanted a file ending in .json, as enable takes it")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if model in TESTBEDS:
        if prompts is not None or size is not None or revision is not None:
            raise ValueError(f"shiva tune: prompts, size and revision are not for the testbed {model!r}")
        bed = get_testbed(model)
        pipe = TestbedPipeline.of(bed, DTYPES[dtype]).to(device)
        texts = [bed.prompts()[i] for i in bed.labels(samples).tolist()]
        identity = {"testbed": model, "folder": fingerprint(bed.model_dir)}
        steps, guidance = steps or TESTBED_STEPS, bed.guidance if guidance is None else guidance
        artefact = str(ASSETS / SHIVA[model]) if artefact is None else artefact
    else:
        pipe = load_pipeline(model, revision, DTYPES[dtype]).to(device)
        texts = read_prompts(prompts)
        identity = {"folder": fingerprint(model)} if Path(model).is_dir() else {"hub": model, "revision": revision}
    if steps is None:
        steps = inspect.signature(pipe.__call__).parameters["num_inference_steps"].default
    study = TuneStudy(
        pipe, identity, texts, Path(cache_dir), samples, steps, guidance, size, artefact, 1, seed, timing_repeats
    )
    dense = cell_of(steps)
    fewer = sorted({max(2, round(share * steps)) for share in STEP_SHARES} - {steps}, reverse=True)
    axes = {
        "selection": [cell_of(steps, each) for each in BUDGETS] if artefact is not None else [],
        "cache": [cell_of(steps, None, each) for each in CACHES],
        "steps": [cell_of(each) for each in fewer],
    }
    alone = {
        axis: [trial for trial in (_tried(study, cell, dense) for cell in found) if trial is not None]
        for axis, found in axes.items()
    }
    trials = [trial for found in alone.values() for trial in found]
    wanted = budget if budget is not None else max((each.speed_up for each in trials), default=1.0)
    for some in candidates(alone, wanted)[:measured]:
        trial = _tried(study, _together(some), dense)
        trials += [] if trial is None else [trial]
    best = choose(trials, budget, bound)
    numbers = {"speed_up": best.speed_up, "ssim": best.fidelity, "samples": samples, "dense_steps": steps}
    found = replace(study.configuration(best.cell), measured=numbers)
    found.save(out)
    for each in sorted(trials, key=lambda each: -each.speed_up):
        mark = "*" if each is best else " "
        print(f"{mark} {each.cell.name:40} {each.speed_up:5.2f}x  SSIM {each.fidelity:.3f}")
    print(f"written: shiva_ext.enable(pipe, {str(out)!r}), and num_inference_steps={found.steps}")
    return found


def _together(some: tuple[Trial, ...]) -> Cell:
    """One cell of trials of several axes."""
    budget = cache = None
    for each in some:
        options = dict(each.cell.options)
        budget = options["budget"] if options["budget"] is not None else budget
        cache = options["cache"] if options["cache"] is not None else cache
    return cell_of(min(each.cell.steps for each in some), budget, cache)
