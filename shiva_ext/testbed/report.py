"""The testbed's table: every method on the same noise, cached row by row, with quality, cost and time side by side."""

import hashlib
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ..evaluation.flops import sd3_forward_flops
from ..evaluation.image_metric import fingerprint
from ..evaluation.metrics import ForegroundRecall, class_accuracy, frechet_distance, gaussian, precision_recall, psnr
from ..files import write_text
from .beds import get_testbed
from .cached_rows import Caches
from .figures import draw_grid, draw_report, kept_share, print_table
from .model import ASSETS
from .rows import METHODS, ROWS, Row, artefact_folder
from .sampling import EULER, STEPS, generate

# Part of every cache key: raise it when a change of the code below changes what a finished row would hold.
VERSION = 2
SHOWN = 6  # images whose kept tokens are drawn


def _mean(tokens: int | tuple[int, int]) -> float:
    return tokens if isinstance(tokens, int) else statistics.fmean(tokens)


@dataclass
class Study:
    """What all rows share, and the cache of finished ones.

    Attributes:
        cache_dir: folder of one JSON file, one PNG grid and one file of images a finished (row, seed), and of one JSON
            file a finished timing; the names are hashes of everything that the result depends on.
        samples: images a row and seed; the classes are balanced.
        seeds: noise seeds 0, 1, ... of the rows that are repeated.
        model_dir: dense model; by default the one that ships.
        guidance, batch_size, dtype: of the sampling; by default the testbed's. Weights in bfloat16, as they ship, are
            the fastest on a CPU.
        steps: of the dense model that PSNR and speed-up compare with.
        timing_repeats: pairs of batches (dense, row) that are timed after one pair to warm up.
        testbed: "fashion" or "emoji".
    """

    cache_dir: Path
    samples: int = 2000
    seeds: int = 3
    model_dir: Path | None = None
    guidance: float | None = None
    batch_size: int | None = None
    dtype: torch.dtype = torch.bfloat16
    steps: int = STEPS
    timing_repeats: int = 5
    testbed: str = "fashion"
    _fingerprints: dict = field(default_factory=dict)

    def __post_init__(self):
        self.cache_dir = Path(self.cache_dir)
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        self.bed = get_testbed(self.testbed, self.model_dir)
        self.guidance = self.bed.guidance if self.guidance is None else self.guidance
        self.batch_size = self.bed.batch_size if self.batch_size is None else self.batch_size
        self.dense = Row("dense", steps=self.steps)
        self.caches = Caches(self.cache_dir / "calibration", self.bed, self.dtype)

    def settings(self, row: Row) -> dict:
        """Everything that a row's images depend on, but for the seed."""
        left_out = {"name", "repeat", "group"} | ({"cache"} if row.cache is None else set())
        left_out |= {"solver"} if row.solver == EULER else set()
        left_out |= {"guidance"} if row.guidance is None else set()
        settings = {key: value for key, value in asdict(row).items() if key not in left_out}
        if row.cache is not None and (file := self.caches.file(*row.cache, row.steps)) is not None:
            settings["calibration"] = json.loads(file.read_text())
        settings |= dict(version=VERSION, samples=self.samples, batch_size=self.batch_size)
        settings |= dict(guidance=self._guidance(row))
        settings |= dict(dtype=str(self.dtype), model=self._digest(self.bed.model_dir))
        settings |= dict(classifier=self._digest(self.bed.judge_dir))
        if folder := artefact_folder(row):
            settings["source"] = self._digest(folder)
        if "tuned" in dict(row.options):
            settings["tuned"] = self._digest(ASSETS / dict(row.options)["tuned"])
        return settings

    def _guidance(self, row: Row) -> float:
        return self.guidance if row.guidance is None else row.guidance

    def _digest(self, folder: Path) -> str:
        if folder not in self._fingerprints:
            self._fingerprints[folder] = fingerprint(folder)
        return self._fingerprints[folder]

    def _file(self, row: Row, **extra) -> Path:
        settings = json.dumps(self.settings(row) | extra, sort_keys=True)
        return self.cache_dir / f"{hashlib.sha256(settings.encode()).hexdigest()[:20]}.json"

    def _setup(self, row: Row):
        transformer, prompts = self.bed.load(self.dtype)
        method = METHODS[row.method](transformer, row, self._guidance(row) > 1)
        if row.cache is not None:
            method = self.caches.put_on(transformer, method, *row.cache, row.steps, self._guidance(row) > 1)
        return transformer, prompts, method

    def _generate(self, transformer, prompts, labels: torch.Tensor, noise: torch.Tensor, row: Row) -> torch.Tensor:
        null = self.bed.null_prompt
        how = dict(null_prompt=null, solver=row.solver)
        return generate(transformer, prompts, labels, noise, row.steps, self._guidance(row), self.batch_size, **how)

    def images(self, row: Row, seed: int) -> torch.Tensor:
        """The images of a finished row, float32 [samples, C, H, W]."""
        return load_file(self._file(row, seed=seed).with_suffix(".safetensors"))["images"].float()

    def kept_picture(self, row: Row, seed: int) -> Path:
        """Where the first images' kept tokens are drawn, if the row leaves any out."""
        return self._file(row, seed=seed).with_suffix(".kept.png")

    def sample(self, row: Row, seed: int) -> dict:
        """Metrics of one row and seed, from the cache if they are there.

        Raises:
            ValueError: the row's images are not finite.
        """
        file = self._file(row, seed=seed)
        if file.is_file():
            return json.loads(file.read_text())
        is_dense = file == self._file(self.dense, seed=seed)
        reference = None if is_dense else self._reference(seed)
        transformer, prompts, method = self._setup(row)
        labels, noise = self.bed.labels(self.samples), self.bed.noise(self.samples, seed)
        layers = transformer.config.num_layers
        recall, work, images = ForegroundRecall(), [({}, 0)] * row.steps, []
        config = transformer.config
        tokens, dim = (config.sample_size // config.patch_size) ** 2, transformer.inner_dim
        batches = list(zip(labels.split(self.batch_size), noise.split(self.batch_size), strict=True))
        for some_labels, some_noise in tqdm(batches, desc=f"{row.name}, seed {seed}", mininterval=2):
            method.record(True)
            some = self._generate(transformer, prompts, some_labels, some_noise, row)
            if not torch.isfinite(some).all():
                raise ValueError(f"row {row.name!r}, seed {seed}: the sampler has diverged to NaN or infinite pixels")
            if kept := method.kept_tokens():
                work = method.work(dim, tokens)
                if self.bed.foreground:
                    recall.add(some, kept, dense_layers=range(1, layers))
                if not images:
                    share = kept_share(kept, len(some_labels), tokens, range(1, layers))[:SHOWN]
                    draw_grid(2 * share[:, None] - 1, file.with_suffix(".kept.png"), SHOWN)
            images.append(some)
        images = torch.cat(images).half()
        result = {"name": row.name, "seed": seed, **self._metrics(images.float(), labels, reference)}
        result |= self._cost(transformer, work, method.router_width, self._guidance(row))
        # Nothing to count means that no layer was pruned.
        result["foreground_recall"] = 1.0 if recall.value is None else recall.value
        if not self.bed.foreground:
            result["foreground_recall"] = None
        if method.measured:
            result["gflops"] = self._measured_flops(transformer, prompts, labels, noise, row) / 1e9
            if not any(kept for kept, _ in work):  # what it leaves out are no whole tokens
                result |= dict(kept_share=None, foreground_recall=None)
        method.disable()
        result["settings"] = self.settings(row) | {"seed": seed}
        save_file({"images": images}, file.with_suffix(".safetensors"))
        draw_grid(images.float(), file.with_suffix(".png"))
        write_text(file, json.dumps(result, indent=1))
        return result

    def _measured_flops(self, transformer, prompts, labels: torch.Tensor, noise: torch.Tensor, row: Row) -> float:
        """Operations of an image, counted while one batch is made."""
        counter, size = FlopCounterMode(display=False), min(self.batch_size, len(labels))
        with counter, sdpa_kernel(SDPBackend.MATH):  # the counter does not know the CPU's fused attention
            self._generate(transformer, prompts, labels[:size], noise[:size], row)
        return counter.get_total_flops() / size

    def _reference(self, seed: int) -> torch.Tensor:
        self.sample(self.dense, seed)
        return self.images(self.dense, seed)

    def _metrics(self, images: torch.Tensor, labels: torch.Tensor, reference: torch.Tensor | None) -> dict:
        (features, predicted), real = self.bed.measure(images), self.bed.statistics
        distance = frechet_distance(*gaussian(features), real["mean"], real["covariance"])
        precision, recall = precision_recall(real["features"], features)
        result = dict(fid=distance, accuracy=class_accuracy(predicted, labels), precision=precision, recall=recall)
        # Equal images have no finite PSNR, and JSON has no infinity.
        decibels = None if reference is None else psnr(images, reference).mean().item()
        return result | dict(psnr=None if decibels == float("inf") else decibels)

    def _cost(self, transformer, work: list[tuple[dict, int]], router_width: int, guidance: float) -> dict:
        tokens = (transformer.config.sample_size // transformer.config.patch_size) ** 2
        flops = sum(
            sd3_forward_flops(transformer, self.bed.prompt_tokens, tokens, kept, router_width) + more
            for kept, more in work
        )
        flops *= 2 if guidance > 1 else 1
        # The first block is dense in every method: the share is that of the others.
        layers = range(1, transformer.config.num_layers)
        share = statistics.fmean(_mean(kept.get(layer, tokens)) / tokens for kept, _ in work for layer in layers)
        return dict(gflops=flops / 1e9, kept_share=share, kept_counts=[kept for kept, _ in work])

    def timing(self, row: Row) -> dict:
        """Seconds an image and speed-up over dense: medians of turns with a dense batch in each."""
        return self.timings([row])[0]

    def timings(self, rows: list[Row], again: bool = False) -> list[dict]:
        """Of several rows, in turns that go through all of them: what drifts meets all alike.

        Args:
            again: time those, too, that have been.
        """
        if missing := [row for row in rows if again or not self._timing_file(row).is_file()]:
            self._time(missing)
        return [json.loads(self._timing_file(row).read_text()) for row in rows]

    def _timing_file(self, row: Row) -> Path:
        # Beside the dense model at the study's own number of steps.
        return self._file(row, timing=self.timing_repeats, threads=torch.get_num_threads(), dense_steps=self.steps)

    def _time(self, rows: list[Row]) -> None:
        labels, noise = self.bed.labels(self.batch_size), self.bed.noise(self.batch_size, seed=0)
        dense, *models = [(*self._setup(each), each) for each in (self.dense, *rows)]

        def seconds(transformer, prompts, method, row: Row) -> float:
            started = time.perf_counter()
            self._generate(transformer, prompts, labels, noise, row)
            return (time.perf_counter() - started) / self.batch_size

        pairs = [[] for _ in rows]
        desc = f"timing {', '.join(dict.fromkeys(row.group for row in rows))}"
        for _ in tqdm(range(self.timing_repeats + 1), desc=desc, mininterval=2):
            for number, model in enumerate(models):
                pairs[number].append([seconds(*dense), seconds(*model)])  # close together: machines drift
        for _, _, method, _ in (dense, *models):
            method.disable()
        for row, (_, *counted) in zip(rows, pairs, strict=True):  # the first turn warms up
            result = {
                "name": row.name,
                "seconds": statistics.median(mine for _, mine in counted),
                "dense_seconds": statistics.median(dense for dense, _ in counted),
                "speed_up": statistics.median(dense / mine for dense, mine in counted),
                "pairs": counted,
            }
            write_text(self._timing_file(row), json.dumps(result, indent=1))

    def resolve(self, row: Row, rows: list[Row]) -> Row:
        """A row whose steps follow from another row's time, with its steps; any other row as it is."""
        if not row.equal_time_as:
            return row
        speed_up = self.timing(next(other for other in rows if other.name == row.equal_time_as))["speed_up"]
        return replace(row, steps=max(1, round(row.steps / speed_up)), equal_time_as="")

    def summary(self, row: Row) -> dict:
        """One line of the table: means over the seeds, sample standard deviation of the distance."""
        results = [self.sample(row, seed) for seed in range(self.seeds if row.repeat else 1)]
        line = {"name": row.name, "group": row.group, "method": row.method, "source": row.source, "steps": row.steps}
        distances = [result["fid"] for result in results]
        line["fid"] = statistics.fmean(distances)
        line["fid_sd"] = statistics.stdev(distances) if len(distances) > 1 else None
        line["fid_seeds"] = distances
        for key in ("accuracy", "precision", "recall", "psnr", "foreground_recall", "gflops", "kept_share"):
            values = [result[key] for result in results]
            line[key] = None if None in values else statistics.fmean(values)
        return line | {key: self.timing(row)[key] for key in ("seconds", "dense_seconds", "speed_up")}


def _check(rows: list[Row]) -> None:
    names = [row.name for row in rows]
    for row in rows:
        if row.method not in METHODS:
            raise ValueError(f"row {row.name!r}: method must be one of {', '.join(METHODS)}, got {row.method!r}")
        if row.equal_time_as and row.equal_time_as not in names:
            raise ValueError(
                f"row {row.name!r} needs the time of row {row.equal_time_as!r}, which is not in the report"
            )
        folder = artefact_folder(row)
        if folder and not folder.is_dir():
            raise FileNotFoundError(
                f"row {row.name!r} needs the artefact {folder}, which is not there: train it with "
                "'shiva train testbed', or leave the row out"
            )


def sweep_guidance(
    scales: Sequence[float] = (1.0, 1.5, 2.0, 3.0, 4.0), samples: int = 300, cache_dir="build/testbed", **settings
) -> dict[float, dict]:
    """The dense row at several guidance scales, to choose :data:`~shiva_ext.testbed.sampling.GUIDANCE` once from.

    Args:
        scales: guidance scales; 1 is no guidance.
        samples: images a scale, all from seed 0.
        cache_dir, settings: as in :func:`report`.

    Returns:
        The metrics of each scale. The Fréchet distance falls with the number of samples: compare these with each other.
    """
    studies = {scale: Study(Path(cache_dir), samples, 1, guidance=scale, **settings) for scale in scales}
    return {scale: study.sample(study.dense, 0) for scale, study in studies.items()}


def report(
    samples: int = 2000,
    seeds: int = 3,
    cache_dir: str | os.PathLike = "build/testbed",
    out_dir: str | os.PathLike = "results",
    rows: list[Row | str] | None = None,
    **settings,
) -> dict:
    """Evaluate the rows, print the table, and write ``testbed.json`` and ``testbed.png``.

    Every finished row and seed is cached: an interrupted report goes on where it stopped, a repeated one only prints.

    Args:
        samples: images a row and seed.
        seeds: noise seeds of the rows that are repeated; the others use the first.
        cache_dir: folder of finished rows, see :class:`Study`.
        out_dir: folder of the results.
        rows: rows or names of :data:`ROWS`; by default all.
        settings: further settings of :class:`Study`.

    Returns:
        What ``testbed.json`` holds.

    Raises:
        FileNotFoundError: an artefact is missing; found before anything is computed.
        ValueError: an unknown row, method or selector, or a row whose images are not finite.
    """
    known = {row.name: row for row in ROWS}
    unknown = [row for row in rows or [] if isinstance(row, str) and row not in known]
    if unknown:
        raise ValueError(f"report: unknown row {unknown[0]!r}; the rows are {', '.join(map(repr, known))}")
    rows = [known[row] if isinstance(row, str) else row for row in rows or ROWS]
    _check(rows)
    study = Study(Path(cache_dir), samples, seeds, **settings)
    rows = [study.resolve(row, rows) for row in rows]
    lines = [study.summary(row) for row in rows]
    content = {
        "command": f"shiva report testbed --samples {samples} --seeds {seeds}",
        "settings": {"samples": samples, "seeds": seeds, "guidance": study.guidance, "batch_size": study.batch_size},
        "machine": {
            "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "rows": lines,
    }
    content["settings"]["dtype"] = str(study.dtype)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_text(out_dir / "testbed.json", json.dumps(content, indent=1) + "\n")
    draw_report(lines, [study.images(row, 0)[:10] for row in rows], out_dir / "testbed.png")
    print_table(lines)
    return content
