"""Pairs (noise, data) of a teacher: data is what its sampler makes of the noise, guidance included.

A folder of pairs holds ``pairs.json``, which says what they were made by, and files ``pairs-000000.safetensors``, ...
of ``chunk`` pairs each: ``noise`` and ``data`` [n, ...] and ``labels`` int64 [n]. A chunk depends on its number and
on what ``pairs.json`` says alone, so the making can stop anywhere and go on, and more pairs leave the first ones as
they are.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ..files import write_text
from ..testbed.sampling import make_noise
from ..training.sampling import derive_seed

VERSION = 1
RECORD = "pairs.json"


class Pairs(NamedTuple):
    """Pairs in memory.

    Attributes:
        noise, data: floating [M, ...].
        labels: int64 [M], what the data were asked to be: a class, or the number of a prompt.
        identity: what they were made by.
    """

    noise: Tensor
    data: Tensor
    labels: Tensor
    identity: dict

    def batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Noise, data and labels of ``count`` pairs, drawn with replacement."""
        index = torch.randint(len(self.noise), (count,), generator=generator)
        return self.noise[index].float(), self.data[index].float(), self.labels[index]


def _file(folder: Path, number: int) -> Path:
    return folder / f"pairs-{number:06d}.safetensors"


def make_pairs(
    out: str | os.PathLike,
    count: int,
    sample: Callable[[Tensor, Tensor], Tensor],
    labels: Callable[[int], Tensor],
    shape: tuple[int, ...],
    teacher: dict,
    seed: int = 0,
    chunk: int = 100,
) -> Pairs:
    """Make the pairs that a folder lacks, and load them.

    Args:
        out: the folder; what is there of the same teacher is kept.
        count: pairs wanted. Whole chunks are made; more of them can be made later.
        sample: the teacher: ``sample(labels [n], noise [n, *shape]) -> data [n, *shape]``. What it gives must depend on
            its arguments alone.
        labels: ``labels(n)``, int64 [n]: what the first n pairs are to show.
        shape: of one sample, such as [C, H, W].
        teacher: all that ``sample`` depends on, as JSON: the fingerprint of its folder, steps, guidance, dtype.
        seed: of the noise.
        chunk: pairs a file.

    Raises:
        ValueError: the folder holds another teacher's pairs, or the teacher's data have another shape or are not
            finite.
    """
    if count < 1 or chunk < 1:
        raise ValueError(f"make_pairs: count is {count} and chunk {chunk}, wanted at least 1 of both")
    folder = Path(out)
    identity = dict(version=VERSION, teacher=teacher, seed=seed, chunk=chunk, shape=list(shape))
    _claim(folder, identity)
    numbers = range(-(-count // chunk))
    wanted = labels(len(numbers) * chunk)
    missing = [number for number in numbers if not _file(folder, number).is_file()]
    done = (len(numbers) - len(missing)) * chunk
    with tqdm(total=len(numbers) * chunk, initial=done, desc="pairs", mininterval=5) as bar:
        for number in missing:
            some = wanted[number * chunk : (number + 1) * chunk]
            noise = make_noise(chunk, derive_seed(seed, "pairs", number), tuple(shape))
            data = sample(some, noise).detach().cpu()
            _check(f"make_pairs: chunk {number} of the teacher's data", data, noise.shape)
            unfinished = _file(folder, number).with_suffix(f".{os.getpid()}.tmp")
            save_file({"noise": noise, "data": data.contiguous(), "labels": some.contiguous()}, unfinished)
            os.replace(unfinished, _file(folder, number))
            bar.update(chunk)
    return load_pairs(folder, count)


def load_pairs(folder: str | os.PathLike, count: int | None = None) -> Pairs:
    """Load the first ``count`` pairs of a folder, or all.

    Raises:
        FileNotFoundError: it holds no pairs, or fewer.
        ValueError: a file is damaged, or holds NaN or infinities.
    """
    folder = Path(folder)
    files = sorted(folder.glob("pairs-*.safetensors"))
    if not (folder / RECORD).is_file() or not files:
        raise FileNotFoundError(f"{folder} holds no pairs; make them with caf.make_pairs or 'shiva train caf'")
    identity = json.loads((folder / RECORD).read_text())
    chunk = identity["chunk"]
    count = len(files) * chunk if count is None else count
    files = [_file(folder, number) for number in range(-(-count // chunk))]
    if absent := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{folder} lacks {absent[0]} for {count} pairs; make them again, the others stay")
    parts = []
    for file in files:
        try:
            part = load_file(file)
            shape = torch.Size([chunk, *identity["shape"]])
            _check(f"{file}: noise", part["noise"], shape)
            _check(f"{file}: data", part["data"], shape)
            _check(f"{file}: labels", part["labels"], shape[:1])
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"shiva_ext: {file} is damaged ({error}); delete it and make the pairs again") from error
        parts.append(part)
    noise, data, labels = (torch.cat([part[name] for part in parts])[:count] for name in ("noise", "data", "labels"))
    return Pairs(noise, data, labels, identity)


def _check(what: str, tensor: Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{what} is {list(tensor.shape)}, wanted {list(shape)}")
    if not torch.isfinite(tensor).all():
        bad = (~torch.isfinite(tensor)).flatten(1).any(1).sum().item()
        raise ValueError(f"{what} has NaN or infinite values in {bad} of {len(tensor)} pairs; wanted finite ones")


def _claim(folder: Path, identity: dict) -> None:
    """Write what a folder's pairs are made by, or compare it with what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / RECORD
    identity = json.loads(json.dumps(identity))
    if not file.is_file():
        write_text(file, json.dumps(identity, indent=1) + "\n")
        return
    found = json.loads(file.read_text())
    other = [f"{k} {found.get(k)} (now {v})" for k, v in identity.items() if found.get(k) != v]
    if other:
        raise ValueError(
            f"shiva_ext: the pairs in {folder} were made otherwise: {'; '.join(other)}; choose another folder, or the "
            "same teacher, steps, guidance and seed"
        )
