"""``shiva train``: from a model and a folder of captioned images to an artefact."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator

from .. import __version__
from . import checkpoint, observe
from .config import FREE, TrainConfig
from .data import find_samples
from .display import make_display
from .encodings import CachedSource, Encoder, EncodingCache
from .method_trainer import MethodTrainer, check_method
from .objectives import objective_for
from .recipes import recipe_for
from .report import write_report
from .samples import save_grid
from .trainer import ShivaTrainer

RUN = "run.json"


def load_pipeline(model: str, revision: str | None, dtype: torch.dtype):
    """A pipeline from a folder, or from the hub at a revision.

    Raises:
        ValueError: a hub id without a revision: what is trained could not be told later.
        FileNotFoundError: neither could be loaded.
    """
    from diffusers import DiffusionPipeline

    if not Path(model).is_dir() and revision is None:
        raise ValueError(
            f"shiva_ext: {model!r} is not a folder here; for a repository on the hub give its revision too (a commit), "
            "so that the training can be repeated"
        )
    index = Path(model) / "model_index.json"
    parts = json.loads(index.read_text()) if index.is_file() else {}
    absent = {name: None for name, kind in parts.items() if kind == [None, None]}  # diffusers wants to be told again
    try:
        return DiffusionPipeline.from_pretrained(
            model, revision=revision, torch_dtype=dtype, use_safetensors=True, **absent
        )
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"shiva_ext: {model!r} could not be loaded as a diffusers pipeline ({error})"
        ) from error


def _begin(out: Path, run: dict, resume: bool) -> None:
    """Write what the run is; a folder that holds checkpoints of another run is left alone."""
    path = out / RUN
    if checkpoint.steps(out / "checkpoints"):
        if not resume:
            raise ValueError(f"shiva_ext: {out} holds a run already; go on with --resume, or choose another folder")
        before = json.loads(path.read_text()) if path.is_file() else {}
        now = {**run, "config": {name: value for name, value in run["config"].items() if name not in FREE}}
        settings = asdict(TrainConfig()) | before.get("config", {})  # a newer setting had its default
        before["config"] = {name: value for name, value in settings.items() if name not in FREE}
        other = [f"{key} {before.get(key)!r} (now {now[key]!r})" for key in now if before.get(key) != now[key]]
        if other:
            raise ValueError(
                f"shiva_ext: the run in {out} is another one: {', '.join(other)}; resume with the same model, data and "
                "settings, or choose another folder"
            )
    out.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(run, indent=1) + "\n")
    os.replace(path.with_suffix(".tmp"), path)


def _track(accelerator: Accelerator, entry: dict, config: TrainConfig) -> None:
    """Hand an entry of the history to accelerate's trackers, at its step in the whole run."""
    values = {name: value for name, value in entry.items() if name not in ("stage", "step")}
    accelerator.log(values, step=config.steps_before(entry["stage"]) + entry["step"])


def _pictures(
    folder: Path, vae, source: CachedSource, config: TrainConfig, main: bool
) -> Callable[[ShivaTrainer, int], None]:
    """Draws the first samples' captions every so many steps: the dense model's images above, the pruned one's below.

    All processes draw, as the weights may be shared out; the main one writes.
    """
    conditions, shape = source.first(config.sample_count)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(config.seed))
    vae = vae.requires_grad_(False)

    def draw(trainer: ShivaTrainer, done: int) -> None:
        if done % config.sample_every:
            return
        drawn = observe.draw(trainer, conditions, noise)
        if main:
            vae.to(trainer.device)
            rows = [trainer.recipe.decode_images(vae, latents) for latents in drawn]
            vae.to("cpu")
            save_grid(rows, folder / f"step-{done:08d}.png")

    return draw


def fit(
    model: str,
    data: str | os.PathLike,
    out: str | os.PathLike,
    config: TrainConfig,
    revision: str | None = None,
    resume: bool = False,
    load: Callable = load_pipeline,
) -> Path:
    """Train selection for a pipeline on one's own images.

    Args:
        model: folder of a diffusers pipeline, or a hub id.
        data: folder of images with captions, see :func:`~shiva_ext.training.data.find_samples`.
        out: folder for the artefact; ``encodings`` and ``checkpoints`` lie in it, too.
        config: see :class:`TrainConfig`.
        revision: of a hub id.
        resume: go on with the run in ``out``, if there is one.
        load: loads the pipeline, see :func:`load_pipeline`.

    Returns:
        ``out``, which :func:`shiva_ext.enable` takes. ``report.html`` in it shows the training.

    Raises:
        FileNotFoundError, ValueError: the model, the data or the run in ``out`` are not as they should be.
        FloatingPointError: the training does not converge.
        OSError: the disk is full.
    """
    out = Path(out)
    state = Accelerator(log_with=config.tracker or None, project_dir=out)
    if config.tracker and not state.log_with:
        raise ValueError(
            f"shiva_ext: the tracker {config.tracker!r} is not installed; pip install {config.tracker}, or tracker ''"
        )
    try:
        return _fit(state, *_prepare(state, model, data, out, config, revision, resume, load), config, resume)
    finally:
        state.end_training()


def _prepare(state: Accelerator, model, data, out: Path, config: TrainConfig, revision, resume: bool, load: Callable):
    """Look at everything that can be wrong with what was asked for, before anything is written."""
    world = state.num_processes
    if config.micro_batches % world:
        raise ValueError(
            f"shiva_ext: micro_batches is {config.micro_batches}, wanted a multiple of the {world} processes"
        )
    samples = find_samples(Path(data))
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    pipe = load(model, revision, dtype)
    if config.method != "shiva":
        check_method(pipe.transformer, config)
    recipe, objective = recipe_for(pipe.transformer), objective_for(pipe.scheduler)
    _check_resolution(pipe, recipe.latent_multiple(pipe.transformer), config.resolution)
    identity = {"model": model, "revision": revision, "resolution": config.resolution, "dtype": str(dtype)}
    cache = EncodingCache(out / "encodings", identity)
    run = {
        "model": model,
        "revision": revision,
        "data": str(Path(data).resolve()),
        "images": len(samples),
        "digest": cache.digest(samples),
        "config": asdict(config),
    }
    with state.main_process_first():
        if state.is_main_process:
            _begin(out, run, resume)
    return pipe, recipe, objective, cache, samples, run


def _check_resolution(pipe, latent_multiple: int, resolution: int) -> None:
    scale = getattr(pipe, "vae_scale_factor", None) or 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    multiple = scale * latent_multiple
    if resolution % multiple:
        raise ValueError(
            f"shiva_ext: resolution is {resolution}, wanted a multiple of {multiple} pixels for this model"
        )


def _fit(
    state: Accelerator, pipe, recipe, objective, cache, samples, run: dict, config: TrainConfig, resume: bool
) -> Path:
    """The run itself."""
    out, transformer, display = cache.folder.parent, pipe.transformer, make_display(state.is_main_process)
    try:
        if cache.missing(samples):
            pipe.to(state.device)
            encoder = Encoder(
                lambda pixels: recipe.encode_images(pipe, pixels),
                lambda captions: recipe.encode_prompts(pipe, captions),
                config.resolution,
            )
            cache.fill(samples, encoder, progress=display.encoding)
        state.wait_for_everyone()
        source = CachedSource(cache, samples, config.prompt_dropout, transformer.dtype)
        pictures = None
        if config.sample_every:
            pictures = _pictures(out / "samples", pipe.vae, source, config, state.is_main_process)
        encoder = pipe = None  # the encoders' memory is free from here on
        if config.tracker:
            state.init_trackers("shiva", asdict(config))
            display.listeners.append(lambda entry: _track(state, entry, config))
        trainer = (ShivaTrainer if config.method == "shiva" else MethodTrainer)(
            transformer.to(state.device),
            config,
            source,
            objective=objective,
            recipe=recipe,
            display=display,
            after_step=pictures,
        )
        try:
            trainer.run(out / "checkpoints", resume)
            probes = (
                observe.probe(trainer) if config.method == "shiva" else None
            )  # by all: the weights may be shared out
            if state.is_main_process:
                source = {"model": run["model"], "revision": run["revision"], "shiva_ext": __version__}
                write_report(out / "report.html", trainer.export(out, source), run, probes)
            state.wait_for_everyone()
        finally:
            trainer.close()
    finally:
        display.close()
    return out
