"""A small Fashion-MNIST classifier: its penultimate features and its verdicts are the testbed's quality metrics."""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from .data import CLASSES, IMAGE_SIZE, load_split, to_float
from .model import ASSETS

FEATURES = 96
WEIGHTS, STATISTICS, RECORD = "classifier.safetensors", "test_statistics.safetensors", "classifier.json"


@dataclass
class ClassifierConfig:
    """Settings of the classifier's training run.

    Attributes:
        epochs: passes over the 60,000 training images.
        batch_size: images a step.
        lr: peak learning rate of AdamW, reached after a quarter of the run and then annealed to 0 (one cycle).
        weight_decay: of AdamW.
        label_smoothing: share of the target spread over all classes.
        ema: decay of the weights' moving average, which is what is saved.
        seed: of the weights, the data order and the flips.
    """

    epochs: int = 10
    batch_size: int = 128
    lr: float = 4e-3
    weight_decay: float = 0.02
    label_smoothing: float = 0.05
    ema: float = 0.997
    seed: int = 0


def conv_block(inputs: int, outputs: int) -> nn.Sequential:
    """A 3 x 3 convolution with batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


@torch.no_grad()
def measure_features(model: nn.Module, images: torch.Tensor, batch_size: int) -> torch.Tensor:
    """``model.features`` of many images, clamped to [-1, 1] first as any saved picture would be.

    Args:
        model: a classifier with a linear layer ``head`` on its features.
        images: float [M, C, H, W].
        batch_size: images a forward pass.

    Returns:
        features, float32 [M, F].

    Raises:
        ValueError: the images have another shape than the model's, or hold values that are not finite.
    """
    if not torch.isfinite(images).all():
        bad = (~torch.isfinite(images)).flatten(1).any(1).sum().item()
        raise ValueError(
            f"{type(model).__name__}.measure: {bad} of {len(images)} images hold NaN or infinite pixels; "
            "the sampler has diverged (try fewer pruned tokens, float32, or a lower guidance)"
        )
    features = [model.features(part.float().clamp(-1, 1)) for part in images.split(batch_size)]
    return torch.cat(features) if features else images.new_empty(0, model.head.in_features, dtype=torch.float32)


class Classifier(nn.Module):
    """Five 3 x 3 convolutions with batch norm, global average pooling and one linear layer (0.2 M parameters)."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            conv_block(1, 24), nn.MaxPool2d(2),
            conv_block(24, 48), nn.MaxPool2d(2),
            conv_block(48, FEATURES), nn.MaxPool2d(2),
            conv_block(FEATURES, FEATURES), conv_block(FEATURES, FEATURES),
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, len(CLASSES))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Penultimate features.

        Args:
            images: float [B, 1, 32, 32] in [-1, 1].

        Returns:
            float [B, 96], not negative: the last convolution's activations averaged over the image.

        Raises:
            ValueError: the images have another shape.
        """
        if images.ndim != 4 or images.shape[1:] != (1, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"Classifier: images must be [B, 1, {IMAGE_SIZE}, {IMAGE_SIZE}] in [-1, 1], got {list(images.shape)}"
            )
        return self.body(images.contiguous(memory_format=torch.channels_last)).mean((2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits float [B, 10] of images float [B, 1, 32, 32] in [-1, 1]."""
        return self.head(self.features(images))

    @torch.no_grad()
    def measure(self, images: torch.Tensor, batch_size: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and verdicts of many images, clamped to [-1, 1] first as any saved picture would be.

        Args:
            images: float [M, 1, 32, 32].
            batch_size: images a forward pass.

        Returns:
            features, float32 [M, 96]; predicted classes, int64 [M].

        Raises:
            ValueError: the images have another shape or hold values that are not finite.
        """
        features = measure_features(self, images, batch_size)
        return features, self.head(features).argmax(1)


def _flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirror each image with probability one half, as the dense model's training data are."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)


def _write_weights(model: Classifier, file: Path) -> None:
    """Kernels in float16, which costs no accuracy and halves the file; batch norm and biases as they are."""
    state = {name: value.half() if value.ndim > 1 else value for name, value in model.state_dict().items()}
    save_file({name: value.contiguous() for name, value in state.items()}, file)


def _write_statistics(model: Classifier, images: torch.Tensor, labels: torch.Tensor, file: Path) -> float:
    """Write what the metrics need of the test split; return the accuracy on it."""
    features, predicted = model.measure(to_float(images))
    wide = features.double()
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:2000]
    examples = torch.cat([(labels == c).nonzero().flatten()[:5] for c in range(len(CLASSES))])
    tensors = {
        "mean": wide.mean(0),
        "covariance": wide.T.cov(),
        "features": features[chosen].half(),
        "example_images": images[examples],
        "example_labels": labels[examples],
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return (predicted == labels).double().mean().item()


def train(config: ClassifierConfig, out: str | os.PathLike | None = None, data_dir: str | None = None) -> dict:
    """Train the classifier and write its weights, record and test statistics (about six minutes on two cores).

    Args:
        config: the settings.
        out: folder to write into; by default the one that ships with the package.
        data_dir: see :func:`shiva_ext.testbed.data.find_data_dir`.

    Returns:
        The record: settings, seconds, test accuracy, loss per epoch.
    """
    out = Path(out or ASSETS / "classifier")
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    images, labels = load_split("train", data_dir)
    model = Classifier().to(memory_format=torch.channels_last).train()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(config.ema), use_buffers=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    steps = len(images) // config.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, config.epochs * steps, pct_start=0.25)
    curve, started = [], time.monotonic()
    for epoch in range(config.epochs):
        order = torch.randperm(len(images), generator=generator)[: steps * config.batch_size]
        total = 0.0
        for index in tqdm(
            order.split(config.batch_size), desc=f"classifier {epoch + 1}/{config.epochs}", mininterval=5
        ):
            batch = _flip(to_float(images[index]), generator)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(batch)
            loss = F.cross_entropy(logits.float(), labels[index], label_smoothing=config.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
            total += loss.item()
        curve.append(round(total / steps, 4))
    seconds = round(time.monotonic() - started)
    _write_weights(average.module, out / WEIGHTS)
    accuracy = _write_statistics(load_classifier(out), *load_split("test", data_dir), out / STATISTICS)
    record = {"config": asdict(config), "seconds": seconds, "test_accuracy": accuracy, "loss_per_epoch": curve}
    (out / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return record


def _folder_with(file: str, folder: str | os.PathLike | None) -> Path:
    folder = Path(folder or ASSETS / "classifier")
    if not (folder / file).is_file():
        raise FileNotFoundError(f"{folder} holds no {file}: train the classifier with 'shiva train classifier' first")
    return folder


def load_classifier(folder: str | os.PathLike | None = None) -> Classifier:
    """Load the classifier in eval mode, float32, without gradients.

    Args:
        folder: as written by :func:`train`; by default the one that ships with the package.

    Raises:
        FileNotFoundError: the folder holds no classifier.
    """
    model = Classifier()
    model.load_state_dict(load_file(_folder_with(WEIGHTS, folder) / WEIGHTS))
    return model.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def load_statistics(folder: str | os.PathLike | None = None) -> dict[str, torch.Tensor]:
    """Load what the metrics need of the 10,000 test images, so that they need no data set.

    Args:
        folder: as written by :func:`train`; by default the one that ships with the package.

    Returns:
        ``mean`` float64 [96] and ``covariance`` float64 [96, 96] of all test features; ``features`` float32 [2000, 96]
        of a fixed random part of them; ``example_images`` uint8 [50, 1, 32, 32] and ``example_labels`` int64 [50],
        the first five of each class.

    Raises:
        FileNotFoundError: the folder holds no statistics.
    """
    tensors = load_file(_folder_with(STATISTICS, folder) / STATISTICS)
    return {**tensors, "features": tensors["features"].float()}
