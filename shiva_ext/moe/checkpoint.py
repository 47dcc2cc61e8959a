"""The files of a model with experts."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import diffusers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shiva_ext.files import write_text

from .layer import MoEConfig, expert_layers
from .presets import HeadNorm, add_qk_norm, share_embedder
from .upcycle import install_experts

FORMAT = 1


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's state, in which tied weights stand once, under the first of their names."""
    state, seen = {}, set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            state[name] = value.detach()
    return state


def save(model: nn.Module, folder: str | os.PathLike) -> None:
    """Write a model with experts to a folder: ``moe.json`` and ``moe.safetensors``.

    The names are not diffusers', whose ``from_pretrained`` would leave the experts out with no more than a warning.

    Raises:
        ValueError: no layers of experts; they are shared out among processes (``gather_experts`` first); or weights
            that :func:`load` would not have, such as an adapter's.
    """
    layers = expert_layers(model)
    if any(not hasattr(layer.experts, "w_in") for layer in layers.values()):
        raise ValueError("the experts are shared out among processes; call gather_experts(model) on all of them first")
    blocks, own = model.transformer_blocks, _weights(model)
    record = dict(
        format=FORMAT,
        model=type(model).__name__,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        config={key: value for key, value in model.config.items() if not key.startswith("_")},
        layers={name: [layer.dim, asdict(layer.config)] for name, layer in layers.items()},
        shared_embedder=_embedder(blocks[0]) is not None and _embedder(blocks[0]) is _embedder(blocks[-1]),
        qk_norm=isinstance(getattr(getattr(blocks[0], "attn1", None), "norm_q", None), HeadNorm),
    )
    if type(model) is not getattr(diffusers, type(model).__name__, None):
        raise ValueError(
            f"{type(model).__name__} is no model of diffusers, which load would build; save what is inside"
        )
    with torch.device("meta"):
        wanted = _weights(_build(record))
    if wrong := _differences(own, wanted):
        raise ValueError(
            f"the model has other weights than its config says, such as {wrong[0]}; merge or unload adapters"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in own.items()}, folder / "moe.safetensors.tmp")
    os.replace(folder / "moe.safetensors.tmp", folder / "moe.safetensors")
    write_text(folder / "moe.json", json.dumps(record, indent=1) + "\n")


def _build(record: dict) -> nn.Module:
    """A model of the recorded form, with fresh weights."""
    model = getattr(diffusers, record["model"]).from_config(record["config"])
    install_experts(model, {name: (dim, MoEConfig(**config)) for name, (dim, config) in record["layers"].items()})
    if record["shared_embedder"]:
        share_embedder(model)
    if record["qk_norm"]:
        add_qk_norm(model)
    return model


def _differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names that are in one alone, or that have another shape."""
    both = set(one) & set(other)
    return sorted(set(one) ^ set(other) | {name for name in both if one[name].shape != other[name].shape})


def _embedder(block: nn.Module) -> nn.Module | None:
    return getattr(getattr(block, "norm1", None), "emb", None)


def load(folder: str | os.PathLike, device: str | torch.device = "cpu") -> nn.Module:
    """The model that :func:`save` wrote, in eval mode.

    Raises:
        FileNotFoundError: the folder has no such files.
        ValueError: they are of a later version, of a model that diffusers does not have, or do not fit each other.
    """
    folder = Path(folder)
    for name in ("moe.json", "moe.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; shiva_ext.moe.save(model, folder) writes it")
    record = json.loads((folder / "moe.json").read_text())
    if record["format"] > FORMAT:
        raise ValueError(f"{folder / 'moe.json'} has format {record['format']}, this version reads up to {FORMAT}")
    if not hasattr(diffusers, record["model"]):
        raise ValueError(f"{folder} has a {record['model']}, which diffusers {diffusers.__version__} does not know")
    model, state = _build(record), load_file(folder / "moe.safetensors")
    nn.Module.to(model, getattr(torch, record["dtype"]))  # not diffusers' own, which warns of every cast
    if wrong := _differences(state, _weights(model)):
        raise ValueError(f"{folder / 'moe.safetensors'} does not fit moe.json: {', '.join(wrong[:4])}")
    for name, weight in model.state_dict(keep_vars=True).items():
        if name in state and weight.dtype != state[name].dtype:  # some may have another than the rest
            weight.data = weight.data.to(state[name].dtype)
    model.load_state_dict(state, strict=False)  # of tied weights one name is there
    return model.eval().to(device)
