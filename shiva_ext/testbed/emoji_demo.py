"""The second testbed's demonstration: prompts in colour, dense and pruned, and where the kept tokens are."""

import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from .demo import compare, generate
from .emoji import PATCH, PROMPT_TOKENS, SIDE, TextEncoder
from .emoji_classifier import load_emoji_classifier
from .emoji_selection import ARTEFACT, DENSE, load_dense
from .figures import kept_share

# The last is no picture of the training set: words of several in a new order.
PROMPTS = ("red apple", "cat face", "octopus", "tulip", "panda", "sleeping cat face")
GUIDANCE = 2.5


def draw(prompts: Sequence[str], images: dict[str, Tensor], share: Tensor, path: Path) -> None:
    """Rows: each variant's images, and where the last one's kept tokens are."""
    figure = Figure(figsize=(1.5 * len(prompts) + 0.6, 1.6 * (len(images) + 1)), layout="constrained")
    axes = figure.subplots(len(images) + 1, len(prompts), squeeze=False)
    for line, (name, batch) in zip(axes, images.items(), strict=False):
        line[0].set_ylabel(name, fontsize=9)
        for axis, image in zip(line, batch, strict=True):
            axis.imshow((image.clamp(-1, 1) / 2 + 0.5).permute(1, 2, 0))
    axes[-1][0].set_ylabel("tokens kept", fontsize=9)
    for axis, each in zip(axes[-1], share, strict=True):
        shown = axis.imshow(each, cmap="magma", vmin=0, vmax=1)
    for axis, prompt in zip(axes[0], prompts, strict=True):
        axis.set_title(prompt, fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(shown, ax=axes[-1].tolist(), label="share of\nlayers, steps")
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    os.replace(temporary, path)


def run(
    out: str | os.PathLike = "build/demo",
    steps: int = 20,
    prompts: Sequence[str] = PROMPTS,
    dense_model: str | os.PathLike = DENSE,
    artefact: str | os.PathLike = ARTEFACT,
) -> dict[str, dict[str, float]]:
    """Generate the prompts dense and pruned; write ``emoji.png``, print and return the table.

    Raises:
        FileNotFoundError: a package with the pictures' names or embeddings is missing, or the model.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    encoder = TextEncoder()
    prompted, unprompted = encoder.encode(list(prompts)), encoder.encode([""] * len(prompts))
    if not Path(artefact).is_dir():
        raise FileNotFoundError(
            f"shiva_ext: there is no selection in {artefact}; train one with 'shiva train emoji-selection'"
        )
    images, records, rows = compare(
        lambda dtype: load_dense(dense_model, dtype),
        (("dense", None), ("Shiva 60 %", artefact)),
        lambda pipe: generate(pipe, prompted, unprompted, SIDE, steps, GUIDANCE),
        PROMPT_TOKENS,
        f"{len(prompts)} prompts, {steps} steps, guidance {GUIDANCE:g}",
        repeats=3,
    )
    draw(
        prompts,
        images,
        kept_share([record["kept"] for record in records], len(prompts), (SIDE // PATCH) ** 2),
        out / "emoji.png",
    )
    classifier = load_emoji_classifier()
    known = [i for i, prompt in enumerate(prompts) if prompt in classifier.captions]
    for name, batch in images.items():
        _, five = classifier.measure(batch)
        right = sum(prompts[i] in [classifier.captions[j] for j in five[i]] for i in known)
        print(f"{name}: {right} of {len(known)} known captions are among the five that a classifier sees first")
    print(f"picture: {out / 'emoji.png'}")
    return rows
