"""Merging an artefact's PEFT adapter into a model's weights, and taking it back bit for bit."""

import os

import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights
from torch import nn

NAME = "shiva"


def inject(model: nn.Module, config: LoraConfig) -> None:
    """Put trainable adapters named "shiva" into a model."""
    inject_adapter_in_model(config, model, adapter_name=NAME)


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


class MergedAdapter:
    """The adapter's weights merged into the model's, so that inference pays nothing for it.

    The original weights are kept as they were, on their device; :meth:`remove` puts the same tensors back.
    """

    def __init__(self, model: nn.Module, folder: str | os.PathLike):
        requires_grad = {id(p): p.requires_grad for p in model.parameters()}
        had_config = getattr(model, "_hf_peft_config_loaded", None)
        config = LoraConfig.from_pretrained(str(folder))
        self.originals: list[tuple[nn.Module, str, torch.Tensor]] = []
        inject(model, config)
        try:
            result = set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"), adapter_name=NAME)
            unexpected = getattr(result, "unexpected_keys", [])
            if unexpected:
                raise ValueError(
                    f"shiva_ext: the adapter in {folder} has weights for layers this model lacks, such as {unexpected[0]!r}"
                )
            for module in model.modules():
                if isinstance(module, LoraLayer) and NAME in module.lora_A:
                    base = module.get_base_layer()
                    original = base.weight.data
                    base.weight.data = original.clone()
                    self.originals.append((base, "weight", original))
                    module.to(original.device)
                    module.merge(safe_merge=True, adapter_names=[NAME])
                    module.merged_adapters.clear()  # the weights stay; the layer is removed below
        except BaseException:
            self.remove()
            raise
        finally:
            remove(model)
            for p in model.parameters():
                p.requires_grad_(requires_grad.get(id(p), p.requires_grad))
            if had_config is None and "_hf_peft_config_loaded" in vars(model):
                del model._hf_peft_config_loaded

    def remove(self) -> None:
        """Give every layer its original weight tensor back."""
        for module, name, original in self.originals:
            getattr(module, name).data = original
        self.originals.clear()
