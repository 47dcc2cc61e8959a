"""``shiva bench pareto --model``: the sweep of every method at several strengths on one's own checkpoint."""

import inspect
import json
import os
import re
import shlex
from base64 import b64encode
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from ..api import find_transformer
from ..evaluation.image_metric import ImageMetric, Measured, fingerprint, mean_of, read_picture
from ..evaluation.image_metrics import METRICS, load_metric
from ..evaluation.metrics import psnr, ssim
from ..models import adapter_for
from ..testbed.figures import draw_grid
from ..training.fit import load_pipeline
from .model_cells import ARTEFACT, PROMPTS, Cell, cells, chosen
from .model_study import SHOWN, ModelStudy, Refused, hash_of, write_json
from .pareto import timing_noise, write_content
from .pareto_page import draw, write_page

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_BATCH = 8  # pictures that a metric is given at a time
_THUMBNAIL = 96  # pixels, twice what the page shows
TO_DENSE = {"psnr": "PSNR to dense, dB, negative", "ssim": "1 - SSIM to dense"}


def read_prompts(file: str | os.PathLike | None) -> list[str]:
    """The lines of a file that are not empty; without one, a few that ship.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or nothing in it.
    """
    if file is None:
        return list(PROMPTS)
    if not Path(file).is_file():
        raise FileNotFoundError(f"shiva bench pareto: --prompts {file} is no file, wanted one with a prompt a line")
    found = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not found:
        raise ValueError(f"shiva bench pareto: --prompts {file} has no prompts, wanted one a line")
    return found


def _check(metrics: list[str], weights: dict[str, str], real, quality: str | None) -> str:
    """The quality to show, if all that was asked for can be."""
    for what, names in (("--metrics", metrics), ("--weights", weights)):
        for name in names:
            if name not in METRICS:
                raise ValueError(
                    f"shiva bench pareto: unknown metric {name!r} in {what}; wanted some of {', '.join(METRICS)}"
                )
    if idle := [name for name in weights if name not in metrics]:
        raise ValueError(f"shiva bench pareto: --weights for {idle[0]!r}, which is not among --metrics")
    if real is not None and "fid" not in metrics:
        raise ValueError("shiva bench pareto: --real is what FID compares with; ask for it too: --metrics fid")
    quality = quality or ("fid" if "fid" in metrics else "ssim")
    if quality not in (*TO_DENSE, *metrics):
        known = ", ".join((*TO_DENSE, *metrics))
        raise ValueError(f"shiva bench pareto: --quality {quality!r} is not measured; wanted one of {known}")
    return quality


def _batches(study: ModelStudy, files: list[Path]) -> Iterator[tuple[torch.Tensor, list[str]]]:
    for start in range(0, len(files), _BATCH):
        some = range(start, min(start + _BATCH, len(files)))
        prompts = [study.prompts[i % len(study.prompts)] for i in some]
        yield torch.stack([read_picture(files[i]) for i in some]), prompts


def _to_dense(files: list[Path], dense: list[Path]) -> dict[str, list | None]:
    """PSNR and SSIM to the dense model's pictures, as :class:`Measured`; None where equal pictures make it infinite."""
    found: dict[str, list] = {"psnr": [], "ssim": []}
    for file, other in zip(files, dense, strict=True):
        pair = [read_picture(each)[None] / 127.5 - 1 for each in (file, other)]
        found["psnr"].append(psnr(*pair))
        found["ssim"].append(ssim(*pair).double())
    values = {name: torch.cat(each) for name, each in found.items()}
    return {name: mean_of(each) if torch.isfinite(each).all() else None for name, each in values.items()}


def _strip(files: list[Path], file: Path) -> str:
    """The first pictures, small, as base64 of a PNG."""
    images = torch.stack([read_picture(each) for each in files[:SHOWN]]) / 127.5 - 1
    if (height := images.shape[-2]) > _THUMBNAIL:
        size = (_THUMBNAIL, round(images.shape[-1] * _THUMBNAIL / height))
        images = torch.nn.functional.interpolate(images, size=size, mode="bilinear", antialias=True)
    draw_grid(images, file, SHOWN)
    return _encoded(file)


def _encoded(file: Path) -> str | None:
    return b64encode(file.read_bytes()).decode() if file.is_file() else None


def _measured(study: ModelStudy, cell: Cell, dense: Cell, metrics: list[ImageMetric]) -> dict[str, Measured | None]:
    """What a cell's pictures are worth, by name; each number is kept on disk."""
    files = study.pictures(cell)

    def kept(what: list, compute: Callable[[], object]):
        file = study.cache_dir / f"value-{hash_of([study.settings(cell), study.samples, *what])}.json"
        if not file.is_file():
            write_json(file, compute())
        return json.loads(file.read_text())

    found = kept(["to dense", study.settings(dense)], lambda: _to_dense(files, study.pictures(dense)))
    for metric in metrics:
        measure = partial(metric.measure, _batches(study, files))
        found[metric.name] = kept([metric.name, metric.identity], measure)
    return {name: None if each is None else Measured(*each) for name, each in found.items()}


def _numbers(measured: dict[str, Measured | None], quality: str) -> dict:
    """A cell's metrics, and the one that the page's axis shows, turned so that less is better."""
    cell = {}
    for name in TO_DENSE:
        each = measured[name]
        cell |= {name: each and each.value, f"{name}_error": each and each.error}
    names = [name for name in measured if name not in TO_DENSE]
    cell["metrics"] = {
        name: {"title": METRICS[name].title, "value": measured[name].value, "error": measured[name].error}
        for name in names
    }
    if quality in TO_DENSE:
        title, start, sign = TO_DENSE[quality], {"ssim": 1, "psnr": 0}[quality], -1
    else:
        start, sign = 0, -1 if METRICS[quality].larger_is_better else 1
        title = METRICS[quality].title + (", negative" if sign < 0 else "")
    shown = measured[quality]
    return cell | {
        "quality": shown and start + sign * shown.value,
        "quality_error": shown and shown.error,
        "quality_draws": shown and [round(start + sign * each, 6) for each in shown.draws],
        "quality_name": title,
    }


def _sweep(study: ModelStudy, wanted: list[Cell], metrics: list[ImageMetric], quality: str) -> tuple[dict, dict]:
    """All cells' numbers by their keys, and the reason for each that the model refused."""
    dense, found, skipped = wanted[0], {}, {}
    for cell in wanted:
        try:
            found[cell] = _numbers(_measured(study, cell, dense, metrics), quality)
        except Refused as refusal:
            skipped[cell.name] = str(refusal)
            print(f"shiva bench pareto: {cell.name} is left out: {refusal}")
    for cell, numbers in found.items():  # all times in one stretch: other work on the machine then meets all alike
        numbers |= study.cost(cell) | study.timing(cell, dense)
        numbers |= {"name": cell.name, "method": cell.method, "steps": cell.steps}
        numbers["strip"] = _strip(study.pictures(cell), study.cache_dir / "strip.png")
        numbers["kept"] = _encoded(study.folder(cell) / "kept.png")
    identities = [metric.identity for metric in metrics]
    return {hash_of([study.settings(c), study.samples, identities]): n for c, n in found.items()}, skipped


def run(
    model: str,
    out: str | os.PathLike = "results",
    name: str | None = None,
    prompts: str | os.PathLike | None = None,
    samples: int = 64,
    steps: int | None = None,
    guidance: float | None = None,
    size: int | None = None,
    artefact: str | None = None,
    methods: list[str] | None = None,
    metrics: list[str] | None = None,
    weights: dict[str, str] | None = None,
    real: str | None = None,
    quality: str | None = None,
    revision: str | None = None,
    dtype: str = "bfloat16",
    device: str | None = None,
    batch_size: int = 1,
    seed: int = 0,
    cache_dir: str | os.PathLike = "build/pareto",
    timing_repeats: int = 3,
) -> dict:
    """Measure every method at its strengths on a pipeline, and write ``out/pareto_<name>.json``, ``.html``, ``.png``.

    All that can be wrong with what was asked for is found before the first picture. Every picture and number is kept
    under ``cache_dir``, so that a run that was stopped goes on, and one with another metric measures only that.

    Args:
        model: folder of a diffusers pipeline, or a hub id with its ``revision``.
        name: of the files; by default the model's.
        prompts: file with a prompt a line; by default a few that ship.
        samples: pictures a cell, from the same noise in all of them.
        steps, guidance, size: of the sampler, and pixels of a side; by default the pipeline's own.
        artefact: folder or hub id of a trained selection, for Shiva's cells.
        methods: names, as in the page's first column; by default all; the dense model always runs.
        metrics: of :data:`~shiva_ext.evaluation.image_metrics.METRICS`; PSNR and SSIM to dense are always measured.
        weights: local weights of metrics, by name.
        real: folder of real pictures for FID.
        quality: what the front is of: "fid", "ssim", "psnr" or another metric that was asked for; by default FID if it
            is measured, else 1 - SSIM.
        dtype, device: of the model; by default on a GPU if there is one.
        batch_size: pictures a call.
        seed: of the noise.
        cache_dir: of pictures and numbers.
        timing_repeats: see :class:`ModelStudy`.

    Returns:
        What the JSON file holds. ``skipped`` says why a method could not run on this model.

    Raises:
        FileNotFoundError, ImportError, TypeError, ValueError: something is missing, unknown or does not fit.
        FloatingPointError: the dense or the pruned model's pictures are not finite.
    """
    asked = dict(locals())
    metrics, weights = list(dict.fromkeys(metrics or [])), weights or {}
    quality = _check(metrics, weights, real, quality)
    lines = read_prompts(prompts)
    if samples < 1 or batch_size < 1 or (steps is not None and steps < 1):
        raise ValueError("shiva bench pareto: --samples, --batch-size and --steps are at least 1")
    if dtype not in DTYPES:
        raise ValueError(f"shiva bench pareto: --dtype is {dtype!r}, wanted one of {', '.join(DTYPES)}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    own = Path(cache_dir)
    ssim(*torch.zeros(2, 1, 3, 16, 16))  # its package, too, must be there before the first picture
    loaded = [load_metric(each, weights.get(each), device, real, own) for each in metrics]
    pipe = load_pipeline(model, revision, DTYPES[dtype]).to(device)
    transformer = find_transformer(pipe)
    layers = len(adapter_for(transformer).blocks(transformer))
    if steps is None:
        steps = inspect.signature(pipe.__call__).parameters["num_inference_steps"].default
    wanted = chosen(cells(steps, layers, artefact is not None), methods)
    identity = {"folder": fingerprint(model)} if Path(model).is_dir() else {"hub": model, "revision": revision}
    study = ModelStudy(
        pipe, identity, lines, own, samples, steps, guidance, size, artefact, batch_size, seed, timing_repeats
    )
    for cell in wanted:
        if cell.kind == ARTEFACT:  # it fits, or it is said now
            with study.enabled(cell):
                pass
    found, skipped = _sweep(study, wanted, loaded, quality)
    name = name or re.sub(r"[^\w.-]+", "_", Path(model).resolve().name if Path(model).is_dir() else model)
    scale = "as the pipeline has it" if guidance is None else f"{guidance:g}"
    about = f"{model}: {samples} pictures a cell of {len(lines)} prompts from the same noise, "
    about += (
        f"{steps} steps unless named, guidance {scale}; times are the whole pipeline's, text encoders and decoder too"
    )
    content = {
        "command": _command(asked),
        "about": about,
        "model": identity,
        "samples": samples,
        "steps": steps,
        "guidance": guidance,
        "quality": quality,
        "prompts": lines,
        "metrics": {metric.name: metric.identity for metric in loaded},
        "skipped": skipped,
        "noise": timing_noise(list(found.values())),
        "cells": found,
    }
    file = Path(out) / f"pareto_{name}.json"
    write_content(file, content)
    draw(list(found.values()), file.with_name(f"pareto_{name}.png"))
    write_page(content, file.with_name(f"pareto_{name}.html"))
    print(f"shiva bench pareto: {len(found)} cells in {file}, the page beside it")
    return content


def _command(asked: dict) -> str:
    """What to type for a run with these arguments; those that are the default are left out."""
    words = ["shiva", "bench", "pareto"]
    for key, parameter in inspect.signature(run).parameters.items():
        value = asked[key]
        if value is None or value == parameter.default:
            continue
        if isinstance(value, dict):
            value = [f"{name}={each}" for name, each in value.items()]
        words += [f"--{key.replace('_', '-')}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return shlex.join(words)
