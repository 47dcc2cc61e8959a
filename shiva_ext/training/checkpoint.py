"""Checkpoints of a training run: whole or absent, checked when read, and never unpickled.

A checkpoint is a folder ``step-00000420`` with ``state.safetensors`` and ``state.json``, which holds the digest of the
first. It is written under another name, flushed to the disk, and renamed.
"""

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
_TENSORS, _RECORD, _UNFINISHED = "state.safetensors", "state.json", ".unfinished-"


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            total.update(part)
    return total.hexdigest()


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(folder: Path, step: int, tensors: dict[str, Tensor], record: dict, keep: int = 2) -> Path:
    """Write one checkpoint and remove all but the last ``keep``.

    Raises:
        OSError: the disk is full or not writable; earlier checkpoints are as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target, unfinished = folder / f"step-{step:08d}", folder / f"{_UNFINISHED}{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir()
        save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, unfinished / _TENSORS)
        content = {"format": FORMAT, "sha256": digest(unfinished / _TENSORS), "step": step, **record}
        (unfinished / _RECORD).write_text(json.dumps(content))
        for name in (_TENSORS, _RECORD):
            flush(unfinished / name)
        flush(unfinished)
        if target.exists():  # the same step once more, after a resume
            shutil.rmtree(target)
        os.rename(unfinished, target)
        flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(
            f"shiva_ext: the checkpoint of step {step} could not be written to {folder} ({error}); earlier ones are "
            "whole: make room and start again with --resume"
        ) from error
    for old in [path for path in steps(folder) if path != target][: -keep + 1 or None]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def steps(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(folder.glob("step-*"))


def read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the record of a checkpoint.

    Raises:
        ValueError: it is damaged, or of a later format.
    """
    try:
        record = json.loads((path / _RECORD).read_text())
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']!r}, this version reads {FORMAT}; update shiva_ext")
        if digest(path / _TENSORS) != record["sha256"]:
            raise ValueError("its tensors are not those it was written with")
        # Copies: a file's tensors lie as they come, and kernels round otherwise on memory that is not aligned.
        return {key: t.clone() for key, t in load_file(path / _TENSORS).items()}, record
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"shiva_ext: the checkpoint {path} cannot be read ({error})") from error


def latest(folder: Path) -> tuple[dict[str, Tensor], dict] | None:
    """The newest checkpoint that can be read, or None if there is none at all.

    A damaged one is passed over with a warning.

    Raises:
        ValueError: there are some, and none can be read.
    """
    for unfinished in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    found = steps(folder)
    for path in reversed(found):
        try:
            return read(path)
        except ValueError as error:
            warnings.warn(str(error), stacklevel=2)
    if found:
        raise ValueError(f"shiva_ext: none of the {len(found)} checkpoints in {folder} can be read; start a new run")
    return None


def flatten(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as named tensors; its parameters are numbered through the groups."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": torch.as_tensor(value) for i, values in state.items() for name, value in values.items()}


def unflatten(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put :func:`flatten`'s tensors back."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
