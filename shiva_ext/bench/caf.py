"""Constant acceleration flow on the testbed: quality against evaluations of a network, straightness, inversion.

CAF (arXiv 2411.00322) is compared with a rectified flow of the same training on the same pairs, with the dense model
in as few steps, and with the dense model as the teacher that made the pairs. All start from the same noise. The axis is
the number of evaluations of a network that one picture takes: N + 1 for N steps of CAF, N for the rectified flow, 2 N
for the dense model, which guidance asks twice. One evaluation is out of CAF's reach.
"""

import hashlib
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ..caf import CAFPipeline
from ..caf.fashion import TEACHER_STEPS
from ..evaluation.image_metric import fingerprint
from ..evaluation.metrics import psnr
from ..evaluation.pareto import DEVIATIONS
from ..files import write_text
from ..testbed.beds import Fashion
from ..testbed.data import to_float
from ..testbed.model import load_model
from ..testbed.sampling import generate
from .caf_figure import draw
from .caf_flows import AccelerationFlow, Flow, VelocityFlow
from .pareto import write_content

# Part of every cache key: raise it when a change of the code below changes what a finished row would hold.
VERSION = 1
CAF, CONTROL, DENSE, TEACHER = "CAF", "rectified flow", "dense", "teacher"
CAF_DIR, CONTROL_DIR = "build/caf/caf", "build/caf/rectified_flow"
STEPS = {CAF: (1, 2, 3, 4), CONTROL: (1, 2, 3, 4, 5), DENSE: (1, 2, 4), TEACHER: (TEACHER_STEPS,)}
INVERSION_STEPS, STRAIGHTNESS_STEPS, STRAIGHTNESS_SAMPLES = (1, 2, 4), 10, 100


@dataclass(frozen=True)
class Row:
    """A sampler with a number of steps."""

    method: str
    steps: int

    @property
    def evaluations(self) -> int:
        """Of a network, for one picture."""
        return {CAF: self.steps + 1, CONTROL: self.steps}.get(self.method, 2 * self.steps)


ROWS = tuple(Row(method, steps) for method, some in STEPS.items() for steps in some)


@dataclass
class Study:
    """What all rows share, and the cache of their pictures.

    Attributes:
        cache_dir: of a file of pictures and one of metrics a finished row, named by what they depend on.
        samples: pictures a row, classes in turn.
        seed: of the noise.
        caf, control, dense: folders of 'shiva train caf', 'shiva train rectified-flow' and the teacher.
        dtype: of the weights.
    """

    cache_dir: Path
    samples: int
    seed: int
    caf: Path
    control: Path
    dense: Path | None = None
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self):
        self.cache_dir = Path(self.cache_dir)
        self.bed = Fashion(self.dense)
        folders = {CAF: Path(self.caf) / "pipeline", CONTROL: Path(self.control) / "transformer"}
        for (method, folder), command in zip(folders.items(), ("caf", "rectified-flow"), strict=True):
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"{folder} is not there, which {method} needs; train it with "
                    f"'shiva train {command} --out {folder.parent}'"
                )
        dense = fingerprint(self.bed.model_dir)
        self.identity = {DENSE: dense, TEACHER: dense} | {name: fingerprint(each) for name, each in folders.items()}
        self.cache_dir.mkdir(parents=True, exist_ok=True)

    def flow(self, method: str, dtype: torch.dtype | None = None) -> Flow:
        """A method's networks and the prompts' embeddings."""
        dtype = dtype or self.dtype
        if method == CAF:
            pipe = CAFPipeline.from_pretrained(Path(self.caf) / "pipeline", torch_dtype=dtype)
            pipe.set_progress_bar_config(disable=True)
            return AccelerationFlow(pipe, self.bed.load(dtype)[1])
        if method == CONTROL:
            return VelocityFlow(*load_model(self.control, dtype))
        return VelocityFlow(*self.bed.load(dtype), guidance=self.bed.guidance, null_prompt=self.bed.null_prompt)

    def file(self, row: Row) -> Path:
        """Of a row's metrics; the pictures have the same name and another ending."""
        models = [self.identity[row.method], self.identity[DENSE]]
        return self._file(method=row.method, steps=row.steps, models=models, dtype=str(self.dtype))

    def _file(self, **settings) -> Path:
        settings |= dict(version=VERSION, samples=self.samples, seed=self.seed, guidance=self.bed.guidance)
        settings |= dict(batch_size=self.bed.batch_size, judge=fingerprint(self.bed.judge_dir))
        return self.cache_dir / f"{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:20]}.json"

    def once(self, name: str, compute: Callable[[], dict | list], **settings) -> dict | list:
        """What ``compute()`` gives of all methods, from the cache if it is there."""
        file = self._file(name=name, models=self.identity, **settings)
        if not file.is_file():
            write_text(file, json.dumps(compute()))
        return json.loads(file.read_text())

    def images(self, row: Row) -> Tensor:
        """The row's pictures, float32 [samples, 1, 32, 32], from the cache if they are there.

        Raises:
            ValueError: they are not finite.
        """
        file = self.file(row).with_suffix(".safetensors")
        if not file.is_file():
            labels, noise = self.bed.labels(self.samples), self.bed.noise(self.samples, self.seed)
            sample, made, size = self._sampler(row), [], self.bed.batch_size
            batches = list(zip(labels.split(size), noise.split(size), strict=True))
            for some, start in tqdm(batches, desc=f"{row.method}, {row.steps} steps", mininterval=2):
                made.append(sample(some, start).half())
            images = torch.cat(made)
            if not torch.isfinite(images).all():
                raise ValueError(f"{row.method} in {row.steps} steps: the sampler has diverged to NaN or infinity")
            save_file({"images": images}, file.with_suffix(".tmp"))
            os.replace(file.with_suffix(".tmp"), file)
        return load_file(file)["images"].float()

    def _sampler(self, row: Row):
        """``sample(labels, noise)``; the teacher's is the one that made the pairs."""
        if row.method != TEACHER:
            flow = self.flow(row.method)
            return lambda labels, noise: flow.generate(labels, noise, row.steps)
        models, bed = self.bed.load(self.dtype), self.bed
        return lambda labels, noise: generate(*models, labels, noise, row.steps, bed.guidance, bed.batch_size)

    def measure(self, row: Row) -> dict:
        """Metrics of a row: FID with the bootstrap's deviation, accuracy, and PSNR to the teacher's pictures."""
        file, images = self.file(row), self.images(row)
        if file.is_file():
            return json.loads(file.read_text())
        found = dict(method=row.method, steps=row.steps, evaluations=row.evaluations)
        found |= self.bed.quality(images, self.bed.labels(self.samples), self.seed)
        if row.method != TEACHER:
            found["psnr_to_teacher"] = psnr(images, self.images(Row(TEACHER, TEACHER_STEPS))).mean().item()
        write_text(file, json.dumps(found))
        return found

    def straightness(self) -> dict[str, float]:
        """NFSS of each method, in float32; 0 is straight."""
        count = min(self.samples, STRAIGHTNESS_SAMPLES)
        labels, noise = self.bed.labels(count), self.bed.noise(count, self.seed)
        flows = {method: self.flow(method, torch.float32) for method in (CAF, CONTROL, DENSE)}
        return {name: flow.straightness(labels, noise, STRAIGHTNESS_STEPS) for name, flow in flows.items()}

    def inversion(self) -> list[dict]:
        """PSNR of real pictures that were inverted and generated again, in float32."""
        real, labels = (self.bed.statistics[f"example_{name}"] for name in ("images", "labels"))
        images, found = to_float(real), []
        for method in (CAF, CONTROL):
            flow = self.flow(method, torch.float32)
            for steps in INVERSION_STEPS:
                again, evaluations = flow.reconstruct(labels, images, steps)
                decibels = psnr(again, images).mean().item()
                found.append(dict(method=method, steps=steps, evaluations=evaluations, psnr=decibels))
        return found


def differences(rows: list[dict]) -> list[dict]:
    """CAF's FID less the rectified flow's at equal evaluations, with half the interval of the paired resamples."""
    at = {(row["method"], row["evaluations"]): row for row in rows}
    found = []
    for (method, evaluations), mine in at.items():
        other = at.get((CONTROL, evaluations))
        if method == CAF and other is not None:
            apart = [a - b for a, b in zip(mine["fid_draws"], other["fid_draws"], strict=True)]
            error = DEVIATIONS * statistics.stdev(apart)
            found.append(dict(evaluations=evaluations, difference=mine["fid"] - other["fid"], error=error))
    return found


def run(
    samples: int = 1000,
    seed: int = 0,
    caf: str | os.PathLike = CAF_DIR,
    control: str | os.PathLike = CONTROL_DIR,
    dense_model: str | os.PathLike | None = None,
    out: str | os.PathLike = "results",
    cache_dir: str | os.PathLike = "build/caf/samples",
    rows: tuple[Row, ...] = ROWS,
) -> dict:
    """Measure all rows, print them, and write ``caf.json`` and ``caf.png`` into ``out``.

    Finished rows are read from the cache: the same command goes on where it was stopped.

    Args:
        samples: pictures a row.
        seed: of the noise.
        caf, control: folders of 'shiva train caf' and 'shiva train rectified-flow'.
        dense_model: the teacher; by default the one that ships.
        out: folder of the results.
        cache_dir: of pictures and metrics.
        rows: to measure.

    Returns:
        What ``caf.json`` holds.

    Raises:
        FileNotFoundError: one of the trainings is missing.
        ValueError: fewer than two samples, or a sampler that diverges.
    """
    if samples < 2:
        raise ValueError(f"shiva bench caf: samples is {samples}, wanted at least 2")
    study = Study(Path(cache_dir), samples, seed, Path(caf), Path(control), dense_model)
    measured = [study.measure(row) for row in rows]
    content = dict(
        command=f"shiva bench caf --samples {samples} --seed {seed}",
        settings=dict(samples=samples, seed=seed, dtype=str(study.dtype), guidance_of_the_teacher=study.bed.guidance),
        training={name: _training(folder) for name, folder in ((CAF, study.caf), (CONTROL, study.control))},
        rows=measured,
        differences=differences(measured),
        straightness=study.once("straightness", study.straightness, steps=STRAIGHTNESS_STEPS),
        inversion=study.once("inversion", study.inversion, steps=INVERSION_STEPS),
    )
    file = Path(out) / "caf.json"
    write_content(file, content)
    draw(measured, {f"{r.method}, {r.evaluations}": study.images(r)[:10] for r in rows}, file.with_suffix(".png"))
    _print(content)
    return content


def _training(folder: Path) -> dict:
    """Settings and pairs of a training, without its losses."""
    record = json.loads((folder / "training.json").read_text())
    return {name: record[name] for name in ("config", "pairs", "device", "seconds")}


def _print(content: dict) -> None:
    console, table = Console(width=110), Table(title=f"{content['settings']['samples']} samples of the same noise")
    for column in ("method", "steps", "evaluations", "FID", "accuracy", "PSNR to teacher dB"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in sorted(content["rows"], key=lambda row: row["evaluations"]):
        decibels = f"{row['psnr_to_teacher']:.2f}" if "psnr_to_teacher" in row else "–"
        fid = f"{row['fid']:.3g} ± {row['fid_error']:.2g}"
        cells = (row["method"], row["steps"], row["evaluations"], fid, f"{row['accuracy']:.1%}", decibels)
        table.add_row(*map(str, cells))
    console.print(table)
    console.print("CAF takes N + 1 evaluations, so it has no row at 1; guidance doubles those of the dense model.")
    for each in content["differences"]:
        text = f"{each['difference']:+.3g} ± {each['error']:.2g}"
        console.print(f"FID of CAF less that of the rectified flow at {each['evaluations']} evaluations: {text}")
    values = ", ".join(f"{name} {value:.4f}" for name, value in content["straightness"].items())
    console.print(f"straightness (NFSS, 0 is straight): {values}")
    for each in content["inversion"]:
        console.print(f"inverted and generated again, {each['method']}, {each['steps']} steps: {each['psnr']:.2f} dB")
