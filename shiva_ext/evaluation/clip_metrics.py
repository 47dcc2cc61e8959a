"""CLIP score and CLIP-IQA: torchmetrics' formulas on any CLIP model of transformers."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from .image_metric import PerImage, brief, fingerprint, unavailable

CLIP = "openai/clip-vit-large-patch14"


class _Features(nn.Module):
    """A CLIP whose features are tensors: those of transformers 5 come in an object that torchmetrics does not know."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, *args) -> Tensor:
        found = self.model.get_image_features(*args)
        return found if torch.is_tensor(found) else found.pooler_output

    def get_text_features(self, *args) -> Tensor:
        found = self.model.get_text_features(*args)
        return found if torch.is_tensor(found) else found.pooler_output


class _Clip(PerImage):
    """What the two share: the model, its processor, and how both are found."""

    def __init__(self, weights: str | None, device: str | torch.device):
        self.function, source = self._function(), CLIP if weights is None else str(weights)
        if weights is not None and not Path(source).exists():
            raise unavailable(self.name, f"a CLIP model in {source!r}", FileNotFoundError("there is no such folder"))
        try:
            model = transformers.CLIPModel.from_pretrained(source).float().eval().requires_grad_(False)
            processor = transformers.CLIPProcessor.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise unavailable(self.name, f"the CLIP model and processor {source!r}", error) from error
        # The tokenizer cuts a long prompt before its last token, which the text's features are read at.
        self.clip, self.device = (_Features(model.to(device)), partial(processor, truncation=True)), device
        self.identity = {
            "weights": source if weights is None else fingerprint(source),
            "commit": getattr(model.config, "_commit_hash", None),
            "pictures": type(processor.image_processor).__name__,
            "transformers": transformers.__version__,
        }

    def _function(self) -> Callable:
        try:
            from torchmetrics.functional import multimodal
        except (ImportError, RuntimeError) as error:  # RuntimeError is a torchvision that does not fit torch
            raise ImportError(
                f"shiva_ext: the metric {self.name!r} needs torchmetrics ({brief(error)}); "
                "pip install 'shiva_ext[eval]'"
            ) from error
        return getattr(multimodal, self.function_name)


class ClipScore(_Clip):
    """100 times the cosine of a picture's and its prompt's CLIP features, at least 0 (arXiv 2104.08718)."""

    name, title, function_name = "clip", "CLIP score", "clip_score"

    @torch.inference_mode()
    def scores(self, images: Tensor, prompts: list[str]) -> Tensor:
        images = images.to(self.device)
        each = zip(images, prompts, strict=True)  # the function gives the mean of what it gets
        return torch.stack([self.function([image], [prompt], lambda: self.clip) for image, prompt in each])


class ClipIqa(_Clip):
    """How much more a picture is like "Good photo." than like "Bad photo.", in [0, 1] (arXiv 2207.12396).

    With CLIP models of transformers, as torchmetrics offers; the paper's own is a ResNet without positions, so compare
    values of one model only.
    """

    name, title, function_name = "clip-iqa", "CLIP-IQA", "clip_image_quality_assessment"

    def scores(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.function(images.to(self.device), lambda: self.clip, data_range=1.0).reshape(-1)
