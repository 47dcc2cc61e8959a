"""Pictures, costs and times of a pipeline under each method, every one kept on disk under a hash of what it is of."""

import hashlib
import inspect
import json
import math
import os
import platform
import statistics
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from tqdm import tqdm

from ..api import find_transformer
from ..evaluation.image_metric import fingerprint
from ..files import write_text
from ..models import adapter_for
from ..testbed.figures import draw_grid, kept_share
from ..testbed.rows import Dense, Enabled
from .model_cells import ARTEFACT, MERGER, Cell

# Part of every key: raise it when a change of the code below changes what a finished file would hold.
VERSION = 1
SHOWN = 6


class Refused(Exception):
    """A method cannot run on this model, and says why."""


class Meter:
    """Counts the transformer's calls: image rows, image tokens and prompt tokens of each."""

    def __init__(self, transformer):
        self.calls: list[tuple[int, int, int]] = []
        self.text = 0
        adapter = adapter_for(transformer)
        self.name, block = adapter.image_argument, adapter.blocks(transformer)[0]
        self.hooks = [transformer.register_forward_pre_hook(self._prompt, with_kwargs=True)]
        self.hooks.append(block.register_forward_pre_hook(self._tokens, with_kwargs=True))

    def _prompt(self, module, args, kwargs) -> None:
        prompt = kwargs.get("encoder_hidden_states")
        self.text = prompt.shape[1] if torch.is_tensor(prompt) else 0

    def _tokens(self, module, args, kwargs) -> None:
        rows, tokens, _ = (kwargs[self.name] if self.name in kwargs else args[0]).shape
        self.calls.append((rows, tokens, self.text))

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *error) -> None:
        for hook in self.hooks:
            hook.remove()


@dataclass
class ModelStudy:
    """What all cells share.

    Attributes:
        pipe: of diffusers, on its device.
        identity: what says which model it is: a hash, or a hub id and its revision.
        prompts: sample i gets prompt i, from the first again after the last one.
        cache_dir: folder of a folder a cell with its pictures, and of a file a timing.
        samples: pictures a cell; sample i begins from the noise of generator ``seed + i`` in every cell.
        steps: of the sampler.
        guidance, size: guidance scale, and height and width in pixels; by default the pipeline's own.
        artefact: folder of a trained selection, if there is one.
        batch_size: pictures a call.
        seed: of the noise.
        timing_repeats: pairs of calls (dense, cell) that are timed after one pair to warm up.
    """

    pipe: diffusers.DiffusionPipeline
    identity: dict
    prompts: list[str]
    cache_dir: Path
    samples: int
    steps: int
    guidance: float | None = None
    size: int | None = None
    artefact: str | None = None
    batch_size: int = 1
    seed: int = 0
    timing_repeats: int = 3

    def __post_init__(self):
        self.cache_dir = Path(self.cache_dir)
        self.transformer = find_transformer(self.pipe)
        self.adapter = adapter_for(self.transformer)
        known = inspect.signature(self.pipe.__call__).parameters
        wanted = ["prompt", "num_inference_steps", "output_type"]
        wanted += ["guidance_scale"] if self.guidance is not None else []
        wanted += ["height", "width"] if self.size is not None else []
        if missing := [name for name in wanted if name not in known]:
            raise ValueError(
                f"shiva bench pareto: {type(self.pipe).__name__} takes no {', '.join(missing)}; wanted a pipeline from "
                "text to images" + ("" if "prompt" in missing else ", or leave the option out")
            )
        self.options = {"output_type": "np"}
        if self.guidance is not None:
            self.options["guidance_scale"] = self.guidance
        if self.size is not None:
            self.options |= {"height": self.size, "width": self.size}
            if "use_resolution_binning" in known:  # it would choose another size, and scale the picture
                self.options["use_resolution_binning"] = False
        # Pipelines that tell whether they guide are asked; PixArt's and others do not.
        told = hasattr(type(self.pipe), "do_classifier_free_guidance") or not self.adapter.guides_in_batch
        scale = self.guidance if self.guidance is not None else getattr(known.get("guidance_scale"), "default", 1)
        self.guided = None if told else (scale or 1) > 1
        self._artefact = None if self.artefact is None else _digest(self.artefact)
        self.pipe.set_progress_bar_config(disable=True)

    def settings(self, cell: Cell) -> dict:
        """Everything that a cell's pictures depend on, but for how many there are."""
        settings = {"version": VERSION, "model": self.identity, "prompts": self.prompts, "seed": self.seed}
        settings |= {"guidance": self.guidance, "size": self.size, "batch_size": self.batch_size}
        settings |= {key: value for key, value in asdict(cell).items() if key != "name"}
        settings |= {"dtype": str(self.transformer.dtype), "device": self.pipe.device.type}
        settings |= {each.__name__: each.__version__ for each in (torch, diffusers, transformers)}
        return settings | ({"artefact": self._artefact} if cell.kind == ARTEFACT else {})

    def folder(self, cell: Cell) -> Path:
        """Where the cell's pictures lie."""
        return self.cache_dir / hash_of(self.settings(cell))

    @contextmanager
    def enabled(self, cell: Cell):
        """The pipeline with the cell's method on it."""
        if cell.kind == "dense":
            yield Dense()
            return
        source, options = cell.source(self.artefact)
        method = Enabled(self.pipe, source, batched_guidance=self.guided, **options)
        try:
            yield method
        finally:
            method.disable()

    def generate(self, indices: range, steps: int) -> np.ndarray:
        """Pictures of these samples, float32 [B,H,W,3] in [0, 1].

        Raises:
            ValueError: the pipeline makes no images.
            FloatingPointError: they are not finite.
        """
        generators = [torch.Generator("cpu").manual_seed(self.seed + i) for i in indices]
        prompts = [self.prompts[i % len(self.prompts)] for i in indices]
        output = self.pipe(prompt=prompts, generator=generators, num_inference_steps=steps, **self.options)
        images = getattr(output, "images", None)
        if images is None or images.ndim != 4:
            raise ValueError(f"shiva bench pareto: {type(self.pipe).__name__} makes no images, wanted one that does")
        if not np.isfinite(images).all():
            raise FloatingPointError("shiva bench pareto: the sampler has diverged to NaN or infinite pixels")
        return images

    def pictures(self, cell: Cell) -> list[Path]:
        """The files of the cell's pictures, of which those that are not there yet are made.

        Raises:
            Refused: a method without training cannot run on this model, or diverges.
            FloatingPointError: another one diverges.
        """
        folder = self.folder(cell)
        if (folder / "refused.json").is_file():
            raise Refused(json.loads((folder / "refused.json").read_text()))
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{i:06d}.png" for i in range(self.samples)]
        starts = range(0, self.samples, self.batch_size)
        batches = [range(start, min(start + self.batch_size, self.samples)) for start in starts]
        cost = folder / "cost.json"
        todo = [each for each in batches if not all(files[i].is_file() for i in each)]
        if not cost.is_file():
            todo = [batches[0], *(each for each in todo if each != batches[0])]
        if not todo:
            return files
        try:
            with self.enabled(cell) as method:
                for indices in tqdm(todo, desc=cell.name, mininterval=2):
                    with Meter(self.transformer) as meter:
                        method.record(not cost.is_file())
                        images = self.generate(indices, cell.steps)
                    if not cost.is_file():
                        write_json(cost, self._cost(method, meter, len(indices), folder))
                        method.record(False)
                    for i, image in zip(indices, images, strict=True):
                        _save(Image.fromarray((image * 255).round().astype(np.uint8)), files[i])
        except (TypeError, ValueError, FloatingPointError) as error:
            refused = not cost.is_file() or isinstance(error, FloatingPointError)  # what ran once does not refuse
            if cell.kind != MERGER or not refused:
                raise
            write_json(folder / "refused.json", str(error))
            raise Refused(str(error)) from error
        return files

    def _cost(self, method, meter: Meter, images: int, folder: Path) -> dict:
        """Operations of a picture and mean share of kept tokens; the first pictures' kept tokens are drawn."""
        state = getattr(getattr(method, "handle", None), "state", None)
        tokens = meter.calls[0][1]
        work = method.work(self.adapter.dims(self.transformer)["dim"], tokens) or [({}, 0)] * len(meter.calls)
        flops, shares, layers = 0, [], len(self.adapter.blocks(self.transformer))
        for (rows, N, text), (kept, more) in zip(meter.calls, work, strict=True):
            scored = None if state is None or state.method is not None else state.choosing(kept)
            one = self.adapter.forward_flops(self.transformer, text, N, kept, method.router_width, scored)
            flops += rows * (one + more)
            counts = [k if isinstance(k, int) else statistics.fmean(k) for k in kept.values()]
            shares.append((sum(counts) / N + layers - len(counts)) / layers)
        recorded = method.kept_tokens()
        if any(recorded) and math.isqrt(tokens) ** 2 == tokens:
            share = kept_share(recorded, images, tokens, range(1, layers))[:SHOWN]
            draw_grid(2 * share[:, None] - 1, folder / "kept.png", SHOWN)
        return {"gflops": flops / images / 1e9, "kept_share": statistics.fmean(shares)}

    def cost(self, cell: Cell) -> dict:
        """``gflops`` of a picture and ``kept_share`` of the tokens, of a cell with pictures."""
        return json.loads((self.folder(cell) / "cost.json").read_text())

    def timing(self, cell: Cell, dense: Cell) -> dict:
        """Seconds a picture of the whole pipeline, encoders and decoder too, and the speed-up over dense.

        Calls of the two alternate, and the medians of the pairs count.
        """
        settings = [self.settings(cell), self.settings(dense), self.timing_repeats, machine(self.pipe.device)]
        file = self.cache_dir / f"time-{hash_of(settings)}.json"
        if file.is_file():
            return json.loads(file.read_text())
        pairs, indices = [], range(self.batch_size)
        for _ in tqdm(range(self.timing_repeats + 1), desc=f"{cell.name}, timing", mininterval=2):
            pair = []
            for each in (dense, cell):
                with self.enabled(each):
                    started = time.perf_counter()
                    self.generate(indices, each.steps)
                    pair.append((time.perf_counter() - started) / len(indices))
            pairs.append(pair)
        pairs = pairs[1:]
        ratios = [before / after for before, after in pairs]
        found = {"speed_up": statistics.median(ratios), "speed_up_range": [min(ratios), max(ratios)]}
        found |= {"seconds": statistics.median(after for _, after in pairs)}
        found |= {"dense_seconds": statistics.median(before for before, _ in pairs), "machine": settings[-1]}
        write_json(file, found)
        return found


def machine(device: torch.device) -> str:
    """What times are taken on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"{platform.machine()}, {capability}, {threads} threads, torch {torch.__version__}"


def hash_of(settings) -> str:
    """A short name for settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:20]


def write_json(file: Path, content) -> None:
    """Write a file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(content, indent=1) + "\n")


def _save(image: Image.Image, file: Path) -> None:
    image.save(file.with_suffix(".tmp"), format="png")
    os.replace(file.with_suffix(".tmp"), file)


def _digest(source: str) -> str:
    """A folder's bytes, or a hub id as it is."""
    return fingerprint(source) if Path(source).is_dir() else str(source)
