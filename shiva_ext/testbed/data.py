"""Fashion-MNIST as 32 x 32 images in [-1, 1], with the class name as the prompt."""

import gzip
import os
from pathlib import Path

import numpy as np
import torch

CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
IMAGE_SIZE = 32
DEFAULT_DIR = "/usr/share/datasets/fashion-mnist"


def find_data_dir(data_dir: str | os.PathLike | None = None) -> Path:
    """Return the folder that holds the four ``*-ubyte.gz`` files.

    Args:
        data_dir: the folder; by default ``$SHIVA_DATA_DIR``, then Debian's ``dataset-fashion-mnist`` location.

    Raises:
        FileNotFoundError: the folder lacks the training images; the message says how to get them.
    """
    folder = Path(data_dir or os.environ.get("SHIVA_DATA_DIR") or DEFAULT_DIR)
    if not (folder / "train-images-idx3-ubyte.gz").is_file():
        raise FileNotFoundError(
            f"Fashion-MNIST was not found in {folder} (no train-images-idx3-ubyte.gz). Install Debian's package with "
            "'apt-get install dataset-fashion-mnist', or download the four .gz files of "
            "https://github.com/zalandoresearch/fashion-mnist and pass their folder as --data-dir (or SHIVA_DATA_DIR)."
        )
    return folder


def _read_idx(path: Path) -> np.ndarray:
    with gzip.open(path, "rb") as file:
        raw = file.read()
    if raw[:2] != b"\0\0" or raw[2] != 8:
        raise ValueError(f"{path} is not an IDX file of unsigned bytes (it starts with {raw[:4]!r})")
    shape = np.frombuffer(raw, dtype=">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def load_split(split: str, data_dir: str | os.PathLike | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Load one split.

    Args:
        split: ``"train"`` (60,000 images) or ``"test"`` (10,000 images).
        data_dir: see :func:`find_data_dir`.

    Returns:
        images, uint8 [M, 1, 32, 32], zero-padded by two pixels on each side; labels, int64 [M].
    """
    prefix = {"train": "train", "test": "t10k"}.get(split)
    if prefix is None:
        raise ValueError(f"load_split: split must be 'train' or 'test', got {split!r}")
    folder = find_data_dir(data_dir)
    images = np.pad(_read_idx(folder / f"{prefix}-images-idx3-ubyte.gz"), ((0, 0), (2, 2), (2, 2)))
    labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz").astype(np.int64)
    return torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels)


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 [0, 255] to float32 [-1, 1]."""
    return images.float() / 127.5 - 1.0


class Batches:
    """Endless shuffled batches with random horizontal flips; its whole state is one generator and one step count.

    Args:
        images: uint8 [M, 1, H, W].
        labels: int64 [M].
        batch_size: images a batch.
        generator: source of the order and the flips.
    """

    def __init__(self, images, labels, batch_size: int, generator: torch.Generator):
        self.images, self.labels = images, labels
        self.batch_size, self.generator = batch_size, generator

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Images float32 [B, 1, H, W] in [-1, 1] and labels int64 [B], drawn with replacement."""
        index = torch.randint(len(self.images), (self.batch_size,), generator=self.generator)
        images = to_float(self.images[index])
        flip = torch.rand(self.batch_size, generator=self.generator) < 0.5
        images[flip] = images[flip].flip(-1)
        return images, self.labels[index]
