"""The two testbeds in one form, for whoever compares methods on either."""

import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from ..evaluation.metrics import bootstrap_distances, class_accuracy, frechet_distance, gaussian
from ..evaluation.pareto import DEVIATIONS
from . import classifier, emoji, model, sampling
from .data import CLASSES
from .emoji_classifier import load_emoji_classifier


class Testbed(ABC):
    """A dense model, its prompts, and what judges its pictures.

    Attributes:
        name: "fashion" or "emoji".
        model_dir: the dense model.
        judge_dir: the classifier.
        guidance, batch_size: of the sampling.
        prompt_tokens: of a prompt.
        null_prompt: label of the empty prompt.
        channels, side: of a picture.
        foreground: whether what is not background can be told from a finished picture.
        statistics: mean, covariance and some features of real pictures, by the classifier.
    """

    __test__ = False  # no test of pytest's
    name: str
    guidance: float
    batch_size: int
    prompt_tokens: int
    null_prompt: int
    channels: int
    side: int
    foreground: bool
    statistics: dict[str, Tensor]

    def __init__(self, model_dir: Path, judge_dir: Path):
        self.model_dir, self.judge_dir = Path(model_dir), Path(judge_dir)

    @abstractmethod
    def load(self, dtype: torch.dtype) -> tuple[SD3Transformer2DModel, Callable[[Tensor], tuple[Tensor, Tensor]]]:
        """The transformer, and what turns labels [B] into prompt tokens and pooled prompts."""

    @abstractmethod
    def prompts(self) -> list[str]:
        """What can be drawn; a label is a place in this list."""

    @abstractmethod
    def labels(self, count: int) -> Tensor:
        """What to draw, int64 [count]."""

    @abstractmethod
    def measure(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [M,F] and the label that each picture looks like, int64 [M]."""

    def quality(self, images: Tensor, labels: Tensor, seed: int = 0) -> dict:
        """How good pictures [M,C,H,W] of the labels [M] are: ``fid`` with ``fid_error``, half its 95 % interval over
        resamples (``fid_draws``, drawn by the seed), and ``accuracy`` by the classifier."""
        (features, predicted), real = self.measure(images), self.statistics
        centre = real["mean"], real["covariance"]
        draws = bootstrap_distances(features, *centre, seed=seed, labels=labels)
        return {
            "fid": frechet_distance(*gaussian(features), *centre),
            "fid_error": DEVIATIONS * statistics.stdev(draws),
            "accuracy": class_accuracy(predicted, labels),
            "fid_draws": [round(each, 4) for each in draws],
        }

    def noise(self, count: int, seed: int) -> Tensor:
        """Noise to start from, float32 [count, channels, side, side]."""
        return sampling.make_noise(count, seed, (self.channels, self.side, self.side))


class Fashion(Testbed):
    """Fashion-MNIST: class names to grey pictures of 32 x 32, 256 tokens."""

    name, guidance, batch_size = "fashion", sampling.GUIDANCE, sampling.BATCH_SIZE
    prompt_tokens, null_prompt = model.PROMPT_TOKENS, model.NULL_PROMPT
    channels, side, foreground = 1, model.IMAGE_SIZE, True

    def __init__(self, model_dir: Path | None = None):
        super().__init__(model_dir or model.ASSETS / "dense", model.ASSETS / "classifier")
        self.classifier, self.statistics = classifier.load_classifier(), classifier.load_statistics()

    def load(self, dtype: torch.dtype):
        return model.load_model(self.model_dir, dtype)

    def prompts(self) -> list[str]:
        return list(CLASSES)

    def labels(self, count: int) -> Tensor:
        return sampling.balanced_labels(count)

    def measure(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.classifier.measure(images)


class Emoji(Testbed):
    """Twemoji: captions to coloured pictures of 64 x 64, 1,024 tokens. Needs the packages of ``shiva_ext[testbed]``."""

    name, guidance, batch_size = "emoji", 2.5, 6
    prompt_tokens, null_prompt = emoji.PROMPT_TOKENS, -1
    channels, side, foreground = 3, emoji.SIDE, False
    REAL = 2000  # compositions that the statistics are of

    def __init__(self, model_dir: Path | None = None):
        super().__init__(model_dir or model.ASSETS / "emoji_dense", model.ASSETS / "emoji_classifier")
        self.classifier = load_emoji_classifier(self.judge_dir)
        pictures, captions = emoji.load_pictures()
        self.captions = captions
        self.class_of = torch.tensor([self.classifier.captions.index(name) for name in captions])
        generator = torch.Generator().manual_seed(0)
        drawn = torch.arange(self.REAL) % len(pictures)
        images = torch.cat([emoji.compose(pictures[some], generator)[0] for some in drawn.split(200)])
        features, _ = self.classifier.measure(images)
        wide = features.double()
        self.statistics = {"mean": wide.mean(0), "covariance": wide.T.cov(), "features": features}

    def load(self, dtype: torch.dtype):
        transformer = SD3Transformer2DModel.from_pretrained(self.model_dir / "transformer", torch_dtype=dtype)
        tables = [table.to(dtype) for table in emoji.TextEncoder().encode([*self.captions, ""])]
        return transformer.eval().requires_grad_(False), lambda labels: tuple(table[labels] for table in tables)

    def prompts(self) -> list[str]:
        return list(self.captions)

    def labels(self, count: int) -> Tensor:
        """Captions in a fixed random order, each as often as another."""
        order = torch.randperm(len(self.captions), generator=torch.Generator().manual_seed(0))
        return order[torch.arange(count) % len(order)]

    def measure(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, five = self.classifier.measure(images)
        label = torch.full((len(self.classifier.captions),), -1)
        label[self.class_of] = torch.arange(len(self.captions))
        return features, label[five[:, 0]]


TESTBEDS: dict[str, type[Testbed]] = {"fashion": Fashion, "emoji": Emoji}


def get_testbed(name: str = "fashion", model_dir: Path | None = None) -> Testbed:
    """A testbed by name.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in TESTBEDS:
        raise ValueError(f"get_testbed: got {name!r}, wanted one of {', '.join(TESTBEDS)}")
    return TESTBEDS[name](model_dir)
