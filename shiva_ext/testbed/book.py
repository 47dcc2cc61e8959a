"""Small language models of a book, byte by byte, with and without concepts (``shiva train concepts``)."""

import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..concept import ConceptConfig, ConceptModel
from ..files import write_text
from ..training.averaged import train_averaged

CONCEPTS_DIR = "build/concepts"
HELD_OUT = 0.05  # the book's last pages
VARIANTS: dict[str, dict] = {
    "none": dict(ratio=None),
    "r2": dict(ratio=2.0),
    "r1.5": dict(ratio=1.5),
    "r2_fixed": dict(ratio=2.0, fixed=True),
    "r1.5_fixed": dict(ratio=1.5, fixed=True),
    "r2_not_joint": dict(ratio=2.0, joint=False),
    "r1.5_not_joint": dict(ratio=1.5, joint=False),
}


@dataclass
class TextConfig:
    """Settings of the training.

    Attributes:
        steps, batch_size, length: of the training; windows of ``length`` bytes a step.
        lr, warmup: of AdamW, and the steps of linear warm-up; the last ``decay`` share of the run falls linearly to 0.
        width, heads, encoder, middle, decoder, reduction, tau: see :class:`~shiva_ext.concept.ConceptConfig`.
        ema: decay of the weights' moving average, which is what is saved.
        checkpoint_every: steps between two checkpoints.
        seed: of the weights and the windows.
    """

    steps: int = 800
    batch_size: int = 8
    length: int = 512
    lr: float = 3e-3
    warmup: int = 50
    decay: float = 0.5
    width: int = 128
    heads: int = 2
    encoder: int = 1
    middle: int = 4
    decoder: int = 1
    reduction: str = "first"
    tau: float = 6.0
    ema: float = 0.99
    checkpoint_every: int = 200
    seed: int = 0

    def model(self, variant: str) -> ConceptConfig:
        """The model's settings in a variant."""
        names = ("width", "heads", "encoder", "middle", "decoder", "reduction", "tau")
        return ConceptConfig(**{name: getattr(self, name) for name in names} | VARIANTS[variant])


def load_book(file: str | os.PathLike | None = None) -> tuple[Tensor, Tensor]:
    """A text's bytes, uint8: all but the last pages to train on, and these.

    Args:
        file: any text; by default the King James Bible of Debian's package bible-kjv, without verse numbers.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: the text is too short to train on.
    """
    if file is not None:
        text = Path(file).read_bytes()
    else:
        program = shutil.which("bible")
        if program is None:
            raise FileNotFoundError(
                "the book was not found: install Debian's package with 'apt-get install bible-kjv', or give another "
                "text with --text FILE"
            )
        text = subprocess.run([program, "-f", "gen1:1-rev22:21"], capture_output=True, check=True).stdout
        text = re.sub(rb"^\S+ ", b"", text, flags=re.MULTILINE)
    if len(text) < 100_000:
        raise ValueError(f"the text has {len(text)} bytes, wanted 100,000 or more")
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    edge = int(len(data) * (1 - HELD_OUT))
    return data[:edge], data[edge:]


def windows(text: Tensor, length: int, starts: Tensor) -> Tensor:
    """int64 [B,length+1] bytes from each start on."""
    return text[starts[:, None] + torch.arange(length + 1)].long()


def train(
    config: TextConfig,
    out: str | os.PathLike = CONCEPTS_DIR,
    variants: list[str] | None = None,
    text: str | os.PathLike | None = None,
) -> None:
    """Train every variant on the same windows, each in a folder of ``out``; what is done already is left alone.

    Args:
        config: the settings.
        out: folder to write.
        variants: some of VARIANTS' names; by default all.
        text: see :func:`load_book`.

    Raises:
        ValueError: an unknown variant.
    """
    wanted = list(VARIANTS) if variants is None else variants
    if unknown := [name for name in wanted if name not in VARIANTS]:
        raise ValueError(f"shiva train concepts: unknown {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    data, _ = load_book(text)
    for variant in wanted:
        folder = Path(out) / variant
        if not (folder / "training.json").is_file():
            _train_one(config, folder, variant, data)


def _train_one(config: TextConfig, folder: Path, variant: str, data: Tensor) -> None:
    torch.manual_seed(config.seed)
    model = ConceptModel(config.model(variant)).train()

    def loss(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(data) - config.length, (config.batch_size,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            return model.loss(windows(data, config.length, starts), generator)

    found = train_averaged(model, loss, config.steps, config, folder / "checkpoints", "concepts")
    temporary = folder / "model.pt.tmp"
    torch.save(found.model.state_dict(), temporary)
    os.replace(temporary, folder / "model.pt")
    record = dict(config=asdict(config), variant=variant, seconds=round(found.seconds), loss=found.curve)
    write_text(folder / "training.json", json.dumps(record))


def load(folder: str | os.PathLike) -> tuple[ConceptModel, TextConfig]:
    """The model that :func:`train` wrote into one of its folders, in eval mode, and the settings."""
    record = json.loads((Path(folder) / "training.json").read_text())
    config = TextConfig(**record["config"])
    model = ConceptModel(config.model(record["variant"]))
    model.load_state_dict(torch.load(Path(folder) / "model.pt", weights_only=True))
    return model.eval().requires_grad_(False), config


@torch.no_grad()
def bits_per_byte(
    model: ConceptModel, text: Tensor, length: int, count: int, batch_size: int = 8
) -> tuple[list, float]:
    """Of ``count`` windows spread evenly over a text, read from nothing.

    Returns:
        bits a byte of each window, and tokens a concept over all of them (1 without chunks).
    """
    starts = torch.linspace(0, len(text) - length - 1, count).long()
    bits, boundaries, tokens = [], 0, 0
    for part in starts.split(batch_size):
        read = windows(text, length, part)
        with torch.autocast("cpu", torch.bfloat16):
            logits, chunks = model(read[:, :-1])
        entropy = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), read[:, 1:], reduction="none")
        bits += (entropy.mean(dim=1) / math.log(2)).tolist()
        tokens += read[:, 1:].numel()
        boundaries += read[:, 1:].numel() if chunks is None else int(chunks.boundary.sum())
    return bits, tokens / boundaries
