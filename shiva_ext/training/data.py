"""A folder of images with captions."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LIST = "metadata.jsonl"


@dataclass(frozen=True)
class Sample:
    """One image file and its caption."""

    image: Path
    caption: str


def find_samples(folder: Path) -> list[Sample]:
    """All images of a folder with their captions, in the order of their names.

    Either there is a ``metadata.jsonl`` with lines ``{"file_name": "a.png", "text": "a red apple"}``, as the datasets
    library has it, or beside each ``a.png`` lies an ``a.txt``.

    Raises:
        FileNotFoundError: there is no such folder, no image in it, an image without a caption or a caption without its
            image; the message names the first ones.
        ValueError: a line of metadata.jsonl cannot be read, or two captions are for one image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"shiva_ext: {folder} is not a folder; wanted one of images with captions")
    found = _listed(folder) if (folder / LIST).is_file() else _beside(folder)
    if not found:
        raise FileNotFoundError(
            f"shiva_ext: {folder} holds no images ({', '.join(IMAGES)}); wanted images with captions, either a .txt "
            f"beside each image or a {LIST}"
        )
    return found


def _listed(folder: Path) -> list[Sample]:
    samples: dict[Path, Sample] = {}
    for number, line in enumerate((folder / LIST).read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, caption = entry["file_name"], entry["text"]
            if not (isinstance(name, str) and isinstance(caption, str)):
                raise TypeError("file_name and text must be strings")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'shiva_ext: line {number} of {folder / LIST} is not {{"file_name": ..., "text": ...}} ({error})'
            ) from error
        image = folder / name
        if not image.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"shiva_ext: line {number} of {folder / LIST} names {name!r}, outside the folder")
        if not image.is_file():
            raise FileNotFoundError(
                f"shiva_ext: line {number} of {folder / LIST} is a caption without its image {name}"
            )
        if image in samples:
            raise ValueError(f"shiva_ext: line {number} of {folder / LIST} is a second caption for {name}")
        samples[image] = Sample(image, caption)
    return sorted(samples.values(), key=lambda sample: sample.image)


def _beside(folder: Path) -> list[Sample]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    images: dict[Path, Path] = {}
    for path in files:
        if path.suffix.lower() in IMAGES and images.setdefault(path.with_suffix(""), path) != path:
            raise ValueError(
                f"shiva_ext: {path.name} and {images[path.with_suffix('')].name} in {path.parent} would share a "
                "caption; rename one"
            )
    captions = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"}
    for kind, have, other, wanted in (
        ("captions without an image", captions, images, "an image"),
        ("images without a caption", images, captions, "a .txt"),
    ):
        missing = sorted(have.keys() - other.keys())
        if missing:
            names = ", ".join(have[stem].name for stem in missing[:3])
            raise FileNotFoundError(
                f"shiva_ext: {folder} holds {len(missing)} {kind} (first: {names}); wanted {wanted} of the same name "
                f"beside each, or a {LIST}"
            )
    return [Sample(path, captions[stem].read_text().strip()) for stem, path in sorted(images.items())]


def load_image(path: Path, side: int) -> Tensor:
    """The middle square of an image, as [3,side,side] in [-1, 1].

    Raises:
        ValueError: the file is damaged or no image.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise ValueError(f"shiva_ext: {path} cannot be read as an image ({error}); mend or remove it") from error
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    square = image.crop((left, top, left + short, top + short)).resize((side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1
