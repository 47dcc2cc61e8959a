"""Latents and prompt embeddings, computed once and kept on disk, so that no encoder is in memory while training."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from .checkpoint import flush
from .data import Sample, load_image
from .processes import rank, world
from .trainer import Batch

_LATENTS, _EMPTY = "latents", "empty-prompt"


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of named tensors: names, types, shapes and bits."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@dataclass
class Encoder:
    """What turns images and captions into a transformer's inputs.

    Attributes:
        images: [B,3,S,S] in [-1, 1] -> latents [B,...].
        prompts: captions -> conditions, each [B,...].
        resolution: S.
    """

    images: Callable[[Tensor], Tensor]
    prompts: Callable[[list[str]], dict[str, Tensor]]
    resolution: int


class EncodingCache:
    """A folder with one file for each (image, caption, encoder), named by their hash, and one for the empty prompt.

    A file that is damaged or missing is computed again; files of other encoders may lie beside.

    Args:
        folder: made when it is filled.
        identity: everything that encodings depend on besides image and caption, as JSON values.
    """

    def __init__(self, folder: Path, identity: dict):
        self.folder, self.identity = Path(folder), json.dumps(identity, sort_keys=True)
        self._paths: dict[Sample, Path] = {}  # hashing an image takes time

    def path(self, sample: Sample | None) -> Path:
        """Where a sample's encodings are; None is the empty prompt."""
        key = hashlib.sha256(self.identity.encode())
        if sample is None:
            return self.folder / f"{_EMPTY}-{key.hexdigest()[:16]}.safetensors"
        if sample not in self._paths:
            key.update(hashlib.sha256(sample.image.read_bytes()).digest())
            key.update(sample.caption.encode())
            self._paths[sample] = self.folder / f"{key.hexdigest()[:32]}.safetensors"
        return self._paths[sample]

    def digest(self, samples: Sequence[Sample]) -> str:
        """A hash of what all samples' encodings depend on."""
        names = "".join(self.path(sample).name for sample in samples)
        return hashlib.sha256(names.encode()).hexdigest()[:32]

    @staticmethod
    def read(path: Path) -> dict[str, Tensor] | None:
        """The tensors of a file, or None if it is missing or damaged."""
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
                return tensors if (file.metadata() or {}).get("digest") == _digest(tensors) else None
        except (OSError, SafetensorError):
            return None

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        unfinished = path.with_suffix(f".unfinished-{os.getpid()}")
        try:
            save_file(tensors, unfinished, {"digest": _digest(tensors)})
            flush(unfinished)
            os.replace(unfinished, path)
        except (OSError, SafetensorError) as error:
            unfinished.unlink(missing_ok=True)
            raise OSError(
                f"shiva_ext: encodings could not be written to {self.folder} ({error}); those before are kept: make "
                "room and start again"
            ) from error

    def missing(self, samples: Sequence[Sample]) -> list[Sample | None]:
        """What has no sound file yet."""
        return [sample for sample in (None, *samples) if self.read(self.path(sample)) is None]

    @torch.no_grad()
    def fill(
        self,
        samples: Sequence[Sample],
        encoder: Encoder,
        batch_size: int = 4,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Compute what is missing; several processes share the work.

        The samples go through the encoder in the same batches, however many are missing and whoever computes them, as
        the last bits depend on the batch; captions go through one by one: some encoders fill them up to the longest.

        Raises:
            ValueError: an image cannot be read.
            OSError: the disk is full.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if rank() == 0 and self.read(self.path(None)) is None:
            self._write(self.path(None), {name: value[0] for name, value in encoder.prompts([""]).items()})
        starts = range(0, len(samples), batch_size)[rank() :: world()]
        for start in starts:
            part = samples[start : start + batch_size]
            missing = [sample for sample in part if self.read(self.path(sample)) is None]
            if missing:
                pixels = torch.stack([load_image(sample.image, encoder.resolution) for sample in part])
                latents = encoder.images(pixels)
            for sample in missing:
                conditions = encoder.prompts([sample.caption])
                own = {name: value[0] for name, value in conditions.items()}
                self._write(self.path(sample), {_LATENTS: latents[part.index(sample)], **own})
            progress(start + len(part), len(samples))


def _padded(values: list[Tensor]) -> Tensor:
    """A batch of tensors; those of captions of other lengths are filled up with zeros along their first axis."""
    length = max(value.shape[0] for value in values) if values[0].ndim else 0
    if any(value.ndim and value.shape[0] != length for value in values):
        values = [F.pad(v, (*[0] * (2 * (v.ndim - 1)), 0, length - v.shape[0])) for v in values]
    return torch.stack(values)


class CachedSource:
    """``next_batch`` of :class:`~shiva_ext.training.trainer.ShivaTrainer` from a filled cache.

    Args:
        cache: of the encoder that the model belongs to.
        samples: what it was filled with.
        prompt_dropout: share of prompts that are replaced by the empty one.
        dtype: of the conditions that are floating-point numbers; latents are float32.

    Raises:
        ValueError: an encoding is missing or damaged.
    """

    def __init__(self, cache: EncodingCache, samples: Sequence[Sample], prompt_dropout: float, dtype=torch.float32):
        self.cache, self.prompt_dropout, self.dtype = cache, prompt_dropout, dtype
        self.paths = [cache.path(sample) for sample in samples]
        self.empty = self._load(cache.path(None))

    def _load(self, path: Path) -> dict[str, Tensor]:
        tensors = self.cache.read(path)
        if tensors is None:
            raise ValueError(f"shiva_ext: the encodings in {path} are missing or damaged; start again to compute them")
        latents = tensors.pop(_LATENTS, None)  # stay in float32 beside the noise
        conditions = {n: t.to(self.dtype) if t.is_floating_point() else t for n, t in tensors.items()}
        return conditions if latents is None else {_LATENTS: latents.float(), **conditions}

    def first(self, count: int) -> tuple[dict[str, Tensor], torch.Size]:
        """Conditions of the first samples, and the shape of their latents."""
        found = [self._load(path) for path in self.paths[:count]]
        latents = torch.stack([tensors.pop(_LATENTS) for tensors in found])
        return {name: _padded([c[name] for c in found]) for name in self.empty}, latents.shape

    def __call__(self, count: int, generator: torch.Generator) -> Batch:
        """``count`` samples drawn with replacement."""
        drawn = torch.randint(len(self.paths), (count,), generator=generator).tolist()
        dropped = (torch.rand(count, generator=generator) < self.prompt_dropout).tolist()
        found = [self._load(self.paths[i]) for i in drawn]
        latents = torch.stack([tensors.pop(_LATENTS) for tensors in found])
        conditions = [self.empty if drop else own for own, drop in zip(found, dropped, strict=True)]
        empty = {name: _padded([tensor]) for name, tensor in self.empty.items()}
        return Batch(latents, {name: _padded([c[name] for c in conditions]) for name in self.empty}, empty)
