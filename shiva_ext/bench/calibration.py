"""``shiva calibrate``: a cache's settings from runs of one's own checkpoint, or of a testbed's model."""

import inspect
import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from ..api import enable
from ..caches.calibrate import calibrate_smoothcache, calibrate_teacache
from ..caches.file import save_cache
from ..testbed.beds import TESTBEDS, Testbed, get_testbed
from ..testbed.sampling import generate
from ..training.fit import load_pipeline
from .model_study import ModelStudy
from .pareto_model import DTYPES, read_prompts

TESTBED_STEPS = 25
CALIBRATIONS = {"teacache": calibrate_teacache, "smoothcache": calibrate_smoothcache}


def calibrate(
    what: str,
    model: str,
    out: str | os.PathLike,
    *,
    revision: str | None = None,
    steps: int | None = None,
    prompts: str | os.PathLike | None = None,
    samples: int = 10,
    guidance: float | None = None,
    size: int | None = None,
    dtype: str = "bfloat16",
    device: str | None = None,
    artefact: str | None = None,
    **settings,
) -> str:
    """Calibrate a cache, and write its file.

    Args:
        what: "teacache" or "smoothcache".
        model: folder of a diffusers pipeline, a hub id with its ``revision``, or a testbed: "fashion", "emoji".
        out: the JSON file.
        steps, guidance, size: of the sampler, and pixels of a side; by default the pipeline's own.
        prompts: file with a prompt a line; by default a few that ship. Of a testbed its own.
        samples: pictures to make.
        dtype, device: of the model.
        artefact: folder or hub id of a selection that is enabled meanwhile.
        settings: of :func:`~shiva_ext.caches.calibrate.calibrate_teacache` or ``calibrate_smoothcache``.

    Returns:
        What was found, in a few lines.

    Raises:
        FileNotFoundError, TypeError, ValueError: something is missing, unknown or does not fit.
    """
    if samples < 1 or (steps is not None and steps < 2):
        raise ValueError(f"shiva calibrate: samples is {samples} and steps {steps}, wanted at least 1 and 2")
    if dtype not in DTYPES:
        raise ValueError(f"shiva calibrate: dtype is {dtype!r}, wanted one of {', '.join(DTYPES)}")
    if Path(out).suffix != ".json":
        raise ValueError(f"shiva calibrate: out is {str(out)!r}, wanted a file ending in .json, as enable takes it")
    if model in TESTBEDS:
        if prompts is not None or size is not None or revision is not None:
            raise ValueError(f"shiva calibrate: prompts, size and revision are not for the testbed {model!r}")
        bed = get_testbed(model)
        target, run, known = testbed_runs(bed, samples, steps or TESTBED_STEPS, guidance, DTYPES[dtype])
    else:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        target = load_pipeline(model, revision, DTYPES[dtype]).to(device)
        if steps is None:
            steps = inspect.signature(target.__call__).parameters["num_inference_steps"].default
        study = ModelStudy(target, {}, read_prompts(prompts), Path(), samples, steps, guidance, size)
        run, known = partial(_each, study, samples, steps), {"batched_guidance": study.guided}
    with ExitStack() as stack:
        if artefact is not None:
            stack.enter_context(enable(target, artefact, batched_guidance=known["batched_guidance"]))
        found = CALIBRATIONS[what](target, run, **known, **settings)
    save_cache(found, out)
    return f"{_described(found)}\nwritten: shiva_ext.enable(pipe, {str(out)!r})"


def _each(study: ModelStudy, samples: int, steps: int) -> None:
    for i in tqdm(range(samples), desc="calibration", mininterval=2):
        study.generate(range(i, i + 1), steps)


def testbed_runs(bed: Testbed, samples: int, steps: int, guidance: float | None, dtype: torch.dtype):
    """A testbed's transformer, what makes pictures with it, and what a calibration has to be told of them."""
    guidance = bed.guidance if guidance is None else guidance
    transformer, prompts = bed.load(dtype)
    labels, noise = bed.labels(samples), bed.noise(samples, seed=10**6)  # not the noise that methods are judged with

    def run() -> None:
        generate(transformer, prompts, labels, noise, steps, guidance, bed.batch_size, null_prompt=bed.null_prompt)

    return transformer, run, {"steps": steps, "batched_guidance": guidance > 1}


def _described(found) -> str:
    if hasattr(found, "r2"):
        shares = ", ".join(f"{share:.0%} at {threshold:.3g}" for share, threshold in sorted(found.thresholds.items()))
        text = " ".join(f"{each:.6g}" for each in found.coefficients)
        return (
            f"polynomial {text} for changes from {found.bounds[0]:.4g} to {found.bounds[1]:.4g}, R2 {found.r2:.3f}\n"
            f"reused calls: {shares}; threshold {found.threshold:.4g}"
        )
    cache = found.cache()
    lines = [f"alpha {found.alpha:.4g}, {cache.computed_share:.0%} of the steps are computed"]
    lines += [f"{kind:15} {' '.join(map(str, schedule))}" for kind, schedule in cache.schedules.items()]
    return "\n".join(lines)
