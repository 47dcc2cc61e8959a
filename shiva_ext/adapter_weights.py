"""Merging an artefact's PEFT adapter into a model's weights, and taking it back bit for bit."""

import os
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

NAME = "shiva"


def inject(model: nn.Module, config: LoraConfig) -> None:
    """Put trainable adapters named "shiva" into a model."""
    inject_adapter_in_model(config, model, adapter_name=NAME)


def load(model: nn.Module, folder: Path | None) -> None:
    """Copy an artefact's adapters into those that :func:`inject` made; None leaves them fresh."""
    if folder is None:
        return
    result = set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"), adapter_name=NAME)
    missing = [key for key in result.missing_keys if f".{NAME}" in key]
    if result.unexpected_keys or missing:
        raise ValueError(
            f"shiva_ext: the adapter in {folder} does not fit this model's: {(result.unexpected_keys + missing)[0]!r}"
        )


def remove(model: nn.Module) -> None:
    """Take the "shiva" adapters out; a layer that had no other adapter gets its plain module back."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer) and NAME in module.lora_A:
            others = [key for key in module.lora_A if key != NAME]
            if others:
                module.delete_adapter(NAME)
            else:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.get_base_layer())
    configs = getattr(model, "peft_config", {})
    configs.pop(NAME, None)
    if "peft_config" in vars(model) and not configs:
        del model.peft_config


def _skeleton(model: nn.Module) -> nn.Module:
    """The model's linear layers under their names and with its weights, but in modules of their own."""
    skeleton = nn.Module()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        # Where there are other adapters, the layer sits below them, and they have layers of their own.
        path = name.removesuffix(".base_layer").split(".")
        if any(part.startswith("lora_") for part in path):
            continue
        linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(module.weight.data, requires_grad=False)
        parent = skeleton
        for part in path[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(path[-1], linear)
    return skeleton


def _merged_weights(model: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """The tuned weights of each layer that the adapter adapts, by the layer's name; the model is only read."""
    config_file, weights_file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not config_file.is_file() or not weights_file.is_file():
        raise FileNotFoundError(
            f"shiva_ext: {folder} lacks {config_file.name} or {weights_file.name}, which hold the tuned weights; "
            "get the whole artefact, or enable with adapter=False"
        )
    skeleton = _skeleton(model)
    with torch.random.fork_rng(devices=[]):  # the adapter is initialised before it is loaded
        inject(skeleton, LoraConfig.from_pretrained(str(folder)))
    result = set_peft_model_state_dict(skeleton, load_file(weights_file), adapter_name=NAME)
    missing = [key for key in result.missing_keys if "lora_" in key]
    if result.unexpected_keys or missing:
        lacks, key = ("model", result.unexpected_keys[0]) if result.unexpected_keys else ("adapter", missing[0])
        raise ValueError(
            f"shiva_ext: the adapter in {folder} was trained for another model: the {lacks} has no {key!r}; enable it "
            "on its own model, or with adapter=False"
        )
    weights = {}
    for name, module in skeleton.named_modules():
        if isinstance(module, LoraLayer):
            module.to(module.get_base_layer().weight.device)
            module.merge(safe_merge=True)
            weights[name] = module.get_base_layer().weight.data
    return weights


def _added(original: torch.Tensor, tuned: list[torch.Tensor]) -> torch.Tensor:
    wide = original.float()
    return (wide + sum(each.float() - wide for each in tuned)).to(original.dtype)


class MergedAdapter:
    """The adapter's weights merged into the model's, so that inference pays nothing for it.

    The original weights are kept as they were; :meth:`remove` puts the same tensors back. Other adapters on the model
    are left alone, and add to the merged weights as they added to the original ones.

    Args:
        model: changed in place.
        folders: of adapters. What each makes of a weight differs from the original by something; with several the
            differences are added up (task arithmetic, arXiv 2212.04089).
    """

    def __init__(self, model: nn.Module, *folders: str | os.PathLike):
        self.originals: list[tuple[nn.Module, torch.Tensor]] = []
        tuned = [_merged_weights(model, Path(folder)) for folder in folders]
        for name in dict.fromkeys(name for weights in tuned for name in weights):
            layer = model.get_submodule(name)
            layer = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
            original, found = layer.weight.data, [weights[name] for weights in tuned if name in weights]
            self.originals.append((layer, original))
            layer.weight.data = found[0] if len(found) == 1 else _added(original, found)

    def remove(self) -> None:
        """Give every layer its original weight tensor back, where the model is and in its dtype by now."""
        for layer, original in self.originals:
            layer.weight.data = original.to(layer.weight.device, layer.weight.dtype)
        self.originals.clear()
