"""DoRA layers that multiply by the tuned weight itself: with many tokens cheaper than PEFT's forward."""

from types import MethodType

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F


def tuned_weight(layer: LoraLayer, name: str) -> Tensor:
    """``m * (W + s B A) / |W + s B A|`` [out,in], norms along the input: DoRA (arXiv 2402.09353), eq. 5.

    As in PEFT the norm is a constant in the backward pass (section 4.3).
    """
    with torch.autocast(layer.weight.device.type, enabled=False):
        direction = layer.weight + layer.scaling[name] * (layer.lora_B[name].weight @ layer.lora_A[name].weight)
        norm = torch.linalg.vector_norm(direction.detach(), dim=1)
        return direction * (layer.lora_magnitude_vector[name].weight / norm)[:, None]


def _forward(layer: LoraLayer, x: Tensor) -> Tensor:
    base = layer.get_base_layer()
    if layer.disable_adapters:
        return base(x)
    return F.linear(x, tuned_weight(layer, layer.active_adapters[0]), base.bias)


def multiply_merged(model: nn.Module, name: str) -> int:
    """Give every DoRA layer whose only adapter is ``name`` a forward on its tuned weight; returns how many got it.

    PEFT adds the adapter on the activations: four elementwise passes over [tokens, out] in the forward alone. Here the
    cost is one product of the weight's size. Layers with other adapters, dropout or quantised weights keep PEFT's.
    """
    changed = 0
    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or list(layer.lora_A) != [name]:
            continue
        plain = type(layer.get_base_layer()) is nn.Linear and layer.weight.is_floating_point()
        if plain and layer.use_dora.get(name) and not isinstance(layer.lora_dropout[name], nn.Dropout):
            layer.forward = MethodType(_forward, layer)
            changed += 1
    return changed
