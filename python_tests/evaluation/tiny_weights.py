"""The metrics' models on a tiny scale, saved as their real weights are."""

import json
import string
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "cat", "dog", "on", "the", "mat", ",")


def pictures(count: int = 4, height: int = 40, width: int = 48) -> torch.Tensor:
    """Waves of all colours, uint8 [count,3,H,W]; the same for every version of torch."""
    place = torch.arange(count * 3 * height * width, dtype=torch.float64).view(count, 3, height, width)
    return (127.5 + 127.5 * torch.sin(place * 0.37 + place.square() * 1e-7)).to(torch.uint8)


def save_clip(folder: Path) -> Path:
    """A CLIP of random weights with its processor; its text holds 16 letters."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = string.ascii_lowercase
    tokens = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = dict(vocab_size=54, max_position_embeddings=16, bos_token_id=52, eos_token_id=53, pad_token_id=53)
    vision = dict(image_size=32, patch_size=8)
    model = CLIPModel(CLIPConfig(text_config=sizes | text, vision_config=sizes | vision, projection_dim=8))
    torch.manual_seed(10)  # the scores of some pictures are above zero, and of some below
    with torch.no_grad():
        for p in model.parameters():  # as initialised, all pictures are alike
            p.copy_(torch.randn(p.shape) * 0.4)
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def _reward_shapes(width: int = 64, text: int = 128, inner: int = 96, layers: int = 2) -> dict[str, tuple[int, ...]]:
    """Names and shapes of ImageReward's checkpoint, as its package has them."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 5, width), "patch_embed.proj": (width, 3, 16, 16)}
    for i in range(layers):
        block = f"blocks.{i}"
        shapes |= {f"{block}.attn.qkv": (3 * width, width), f"{block}.attn.proj": (width, width)}
        shapes |= {f"{block}.mlp.fc1": (4 * width, width), f"{block}.mlp.fc2": (width, 4 * width)}
        shapes |= {f"{block}.norm1": (width,), f"{block}.norm2": (width,)}
    shapes |= {"norm": (width,)}
    shapes = {f"blip.visual_encoder.{name}": shape for name, shape in shapes.items()}
    read = {"embeddings.word_embeddings": (len(WORDS) + 2, text), "embeddings.position_embeddings": (40, text)}
    read |= {"embeddings.LayerNorm": (text,)}
    for i in range(layers):
        layer = f"encoder.layer.{i}"
        for attention, context in (("attention", text), ("crossattention", width)):
            own = f"{layer}.{attention}"
            read |= {f"{own}.self.query": (text, text), f"{own}.self.key": (text, context)}
            read |= {f"{own}.self.value": (text, context), f"{own}.output.dense": (text, text)}
            read |= {f"{own}.output.LayerNorm": (text,)}
        read |= {f"{layer}.intermediate.dense": (inner, text), f"{layer}.output.dense": (text, inner)}
        read |= {f"{layer}.output.LayerNorm": (text,)}
    shapes |= {f"blip.text_encoder.{name}": shape for name, shape in read.items()}
    head = {0: (1024, text), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    head = {f"mlp.layers.{number}": shape for number, shape in head.items()}
    return shapes | head | {"blip.vision_proj": (8, width)}


def save_reward(folder: Path) -> Path:
    """An ImageReward checkpoint of two layers each, with weights from a formula, and the tokenizer's vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    state, phase = {}, 0.0

    def noise(shape: tuple[int, ...], scale: float) -> torch.Tensor:
        nonlocal phase
        phase += 1.0
        place = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
        hashed = torch.sin(place * 12.9898 + phase) * 43758.5453
        return (3**0.5 * scale * (2 * (hashed - hashed.floor()) - 1)).view(shape).float()

    for name, shape in _reward_shapes().items():
        if len(shape) == 1:  # a norm
            state[f"{name}.weight"], state[f"{name}.bias"] = 1 + noise(shape, 0.2), noise(shape, 0.2)
        elif name.endswith(("cls_token", "pos_embed")):
            state[name] = noise(shape, 1.0)
        elif "embeddings" in name:
            state[f"{name}.weight"] = noise(shape, 1.0)
        else:
            state[f"{name}.weight"] = noise(shape, 1.2 * torch.Size(shape[1:]).numel() ** -0.5)
            state[f"{name}.bias"] = noise(shape[:1], 0.1)
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    torch.save(state, folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder
