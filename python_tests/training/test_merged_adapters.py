"""The forward on tuned weights against PEFT's own, which adds the adapter on the activations."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from shiva_ext.training.merged_adapters import multiply_merged
from shiva_ext.training.stages import adapters_off


def make_model(dropout: float = 0.0, use_dora: bool = True, bias: bool = True, names=("shiva",)) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20, bias=bias), nn.SiLU(), nn.Linear(20, 7))
    model.double().requires_grad_(False)
    for name in names:
        config = LoraConfig(r=4, lora_alpha=10, use_dora=use_dora, target_modules=["0", "2"], lora_dropout=dropout)
        inject_adapter_in_model(config, model, adapter_name=name)
    with torch.no_grad():  # as after some training
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(0.3 * torch.randn(p.shape))
    return model.double()


def adapters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 12), (2, 9, 12), (0, 12)])
def test_output_and_gradients_are_peft_s(shape, bias):
    ours, theirs = make_model(bias=bias), make_model(bias=bias)
    assert multiply_merged(ours, "shiva") == 2
    x = torch.randn(shape, dtype=torch.float64)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    weight = torch.randn(*shape[:-1], 7, dtype=torch.float64)
    for model, each in zip((ours, theirs), inputs, strict=True):
        (model(each) * weight).sum().backward()
    assert torch.allclose(ours(x), theirs(x), rtol=1e-10, atol=1e-12)
    assert torch.allclose(inputs[0].grad, inputs[1].grad, rtol=1e-10, atol=1e-12)
    reference = adapters(theirs)
    for name, p in adapters(ours).items():
        assert p.grad is not None and torch.allclose(p.grad, reference[name].grad, rtol=1e-9, atol=1e-11), name


def test_switched_off_it_is_the_plain_layer():
    model = make_model()
    plain = [layer.get_base_layer() for layer in model.modules() if isinstance(layer, LoraLayer)]
    x = torch.randn(3, 12, dtype=torch.float64)
    expected = plain[1](nn.functional.silu(plain[0](x)))
    multiply_merged(model, "shiva")
    with adapters_off(model):
        assert torch.equal(model(x), expected)
    assert not torch.equal(model(x), expected)


@pytest.mark.parametrize("options", [dict(dropout=0.5), dict(use_dora=False), dict(names=("shiva", "other"))])
def test_what_it_cannot_express_keeps_peft_s_forward(options):
    model = make_model(**options)
    x = torch.randn(3, 12, dtype=torch.float64)
    model.eval()
    expected = model(x)
    assert multiply_merged(model, "shiva") == 0
    assert torch.equal(model(x), expected)


def test_the_weight_is_made_in_full_precision_under_autocast():
    model = make_model().float()
    multiply_merged(model, "shiva")
    seen = []
    original = nn.functional.linear
    with torch.autocast("cpu", torch.bfloat16), pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "linear", lambda x, w, b=None: seen.append(w.dtype) or original(x, w, b))
        output = model(torch.randn(3, 12))
    assert output.dtype == torch.bfloat16 and seen == [torch.float32] * 2
