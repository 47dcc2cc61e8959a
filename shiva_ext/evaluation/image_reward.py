"""ImageReward on transformers' BLIP: its own package wants releases of timm and transformers that are years old."""

import re
from pathlib import Path
from pickle import UnpicklingError

import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from .image_metric import PerImage, brief, fingerprint, unavailable

CHECKPOINT, REPOSITORY, TOKENIZER = "ImageReward.pt", "THUDM/ImageReward", "google-bert/bert-base-uncased"
_HEAD_DIM = 64  # of both BERT and the vision transformer
_MAX_TOKENS = 35
_MEAN, _DEVIATION = 0.16717362830052426, 1.0333394966054072  # of the rewards of the published training data
_PIXEL_MEAN, _PIXEL_DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# Names of the published vision transformer, and transformers' for the same weights.
_VISION = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.norm([12])\.", r".layer_norm\1."),
)


def _part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}


def _layers(weights: dict[str, Tensor], pattern: str) -> int:
    return len({found[1] for name in weights if (found := re.match(pattern, name))})


def _vision(weights: dict[str, Tensor]) -> nn.Module:
    from transformers import BlipVisionConfig, BlipVisionModel

    patch, width = weights["patch_embed.proj.weight"].shape[-1], weights["pos_embed"].shape[-1]
    model = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=width,
            intermediate_size=weights["blocks.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=_layers(weights, r"blocks\.(\d+)\."),
            num_attention_heads=width // _HEAD_DIM,
            image_size=round((weights["pos_embed"].shape[1] - 1) ** 0.5) * patch,
            patch_size=patch,
            layer_norm_eps=1e-6,
        )
    )
    for pattern, name in _VISION:
        weights = {re.sub(pattern, name, old): value for old, value in weights.items()}
    model.load_state_dict(weights)
    return model


def _text(weights: dict[str, Tensor]) -> nn.Module:
    from transformers import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    vocabulary, width = weights["embeddings.word_embeddings.weight"].shape
    model = BlipTextModel(
        BlipTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            encoder_hidden_size=weights["encoder.layer.0.crossattention.self.key.weight"].shape[1],
            intermediate_size=weights["encoder.layer.0.intermediate.dense.weight"].shape[0],
            num_hidden_layers=_layers(weights, r"encoder\.layer\.(\d+)\."),
            num_attention_heads=width // _HEAD_DIM,
            max_position_embeddings=weights["embeddings.position_embeddings.weight"].shape[0],
        ),
        add_pooling_layer=False,
    )
    model.load_state_dict({name: value for name, value in weights.items() if name != "embeddings.position_ids"})
    return model


def _head(weights: dict[str, Tensor]) -> nn.Sequential:
    """Linear layers alone: between them the published head has only dropout."""
    numbers = sorted({int(name.split(".")[0]) for name in weights})
    head = nn.Sequential(*(nn.Linear(*reversed(weights[f"{number}.weight"].shape)) for number in numbers))
    head.load_state_dict({f"{i}.{n}": weights[f"{k}.{n}"] for i, k in enumerate(numbers) for n in ("weight", "bias")})
    return head


def _files(weights: str | None) -> tuple[Path, str]:
    """The checkpoint, and where the tokenizer is."""
    if weights is None:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(REPOSITORY, CHECKPOINT)), TOKENIZER
    folder = Path(weights)
    for name, what in ((CHECKPOINT, f"of {REPOSITORY}"), ("vocab.txt", f"of {TOKENIZER}")):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}, which it should hold a copy {what}")
    return folder / CHECKPOINT, str(folder)


class RewardModel(nn.Module):
    """How well people would like a picture for a prompt: ImageReward (arXiv 2304.05977).

    The published checkpoint holds a BLIP (a vision transformer, and a BERT that attends to its output) and a linear
    head on the first token. Its sizes are read from the weights.

    Args:
        weights: folder with ``ImageReward.pt`` and BERT's ``vocab.txt``; by default both come from the hub.

    Raises:
        OSError: a file is missing, or the hub cannot be reached.
        ValueError: the checkpoint is another model's.
    """

    def __init__(self, weights: str | None = None):
        super().__init__()
        self.file, tokenizer = _files(weights)
        self.tokenizer = transformers.BertTokenizer.from_pretrained(tokenizer)
        try:
            state = torch.load(self.file, map_location="cpu", weights_only=True)
            self.vision = _vision(_part(state, "blip.visual_encoder."))
            self.text = _text(_part(state, "blip.text_encoder."))
            self.head = _head(_part(state, "mlp.layers."))
        except (UnpicklingError, LookupError, RuntimeError, AttributeError, EOFError, ValueError) as error:
            raise ValueError(f"shiva_ext: {self.file} is not ImageReward's checkpoint ({brief(error)})") from error
        self.eval().requires_grad_(False)

    def pixels(self, image: Tensor) -> Tensor:
        """A picture uint8 [3,H,W] as the model takes it, float32 [3,S,S]: its shorter side to S, cut to the middle."""
        size = self.vision.config.image_size
        picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
        short = min(picture.size)
        picture = picture.resize([size * side // short for side in picture.size], Image.BICUBIC)
        left, top = (round((side - size) / 2) for side in picture.size)
        picture = picture.crop((left, top, left + size, top + size))
        values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)
        mean, deviation = (torch.tensor(each)[:, None, None] for each in (_PIXEL_MEAN, _PIXEL_DEVIATION))
        return (values / 255 - mean) / deviation

    @torch.inference_mode()
    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Rewards float32 [B] of pictures uint8 [B,3,H,W] for their prompts; 0 is the mean of the training data."""
        device = self.head[0].weight.device
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=_MAX_TOKENS, return_tensors="pt"
        ).to(device)
        seen = self.vision(torch.stack([self.pixels(image) for image in images]).to(device)).last_hidden_state
        read = self.text(
            tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=device),
        ).last_hidden_state
        return ((self.head(read[:, 0]) - _MEAN) / _DEVIATION)[:, 0]


class ImageReward(PerImage):
    """People's preference by the model of arXiv 2304.05977, see :class:`RewardModel`."""

    name, title = "image-reward", "ImageReward"

    def __init__(self, weights: str | None, device: str | torch.device):
        try:
            self.model, self.device = RewardModel(weights).to(device), device
        except OSError as error:
            raise unavailable(self.name, f"{CHECKPOINT} of {REPOSITORY} and BERT's vocabulary", error) from error
        self.identity = {"weights": fingerprint(self.model.file), "transformers": transformers.__version__}

    def scores(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.model(images.to(self.device), prompts)
