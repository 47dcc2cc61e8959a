"""What a metric of pictures is, and what all of them use."""

import hashlib
import os
import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .pareto import DEVIATIONS

# A batch of pictures uint8 [B,3,H,W] with a prompt for each.
Batch = tuple[Tensor, list[str]]
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def fingerprint(path: str | os.PathLike) -> str:
    """SHA-256 of a file, or over the names and bytes of all files in a folder; they may be larger than the memory."""
    path, digest = Path(path), hashlib.sha256()
    for file in [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while part := stream.read(1 << 22):
                digest.update(part)
    return digest.hexdigest()


def read_picture(file: str | os.PathLike) -> Tensor:
    """A picture file as uint8 [3,H,W]."""
    return torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1).contiguous()


class Measured(NamedTuple):
    """A metric of a set of pictures.

    Attributes:
        value: of all of them.
        draws: of resamples of them, which are the same rows for every set of as many pictures: two methods' pictures
            from the same noise are resampled together.
    """

    value: float
    draws: list[float]

    @property
    def error(self) -> float:
        """Half the width of the value's 95 % interval; 0 where there is one picture and nothing is known."""
        return DEVIATIONS * statistics.stdev(self.draws)


def resamples(count: int, draws: int = 100, seed: int = 0) -> Iterator[Tensor]:
    """The rows of each resample of so many pictures, int64 [count]."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(draws):
        yield torch.randint(count, (count,), generator=generator)


def mean_of(values: Tensor) -> Measured:
    """The mean of one number a picture [M]."""
    return Measured(values.mean().item(), [values[rows].mean().item() for rows in resamples(len(values))])


class ImageMetric(ABC):
    """A number for a set of pictures.

    Attributes:
        name: what it is asked for by.
        title: as printed.
        larger_is_better: its sense.
        identity: what its values depend on besides the pictures: weights, versions.
    """

    name: str
    title: str
    larger_is_better = True
    identity: dict

    @abstractmethod
    def measure(self, batches: Iterable[Batch]) -> Measured:
        """The metric of all pictures."""


class PerImage(ImageMetric):
    """A metric that is the mean of one number a picture."""

    @abstractmethod
    def scores(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B] of pictures uint8 [B,3,H,W]."""

    def measure(self, batches: Iterable[Batch]) -> Measured:
        return mean_of(torch.cat([self.scores(images, prompts).double().cpu() for images, prompts in batches]))


def brief(error: Exception) -> str:
    """An error on one line: torch's and the hub's go on for many, with advice on how to call them."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def unavailable(name: str, what: str, error: Exception) -> FileNotFoundError:
    """What to raise where a metric's weights cannot be had."""
    return FileNotFoundError(
        f"shiva_ext: the metric {name!r} needs {what}, which could not be loaded ({brief(error)}); connect this "
        f"machine to where it is published, or copy it here and say where: --weights {name}=PATH"
    )
