"""Selection beside what else people put on a model, for every family: LoRA, DoRA, int8 weights, offloading, casting.

The second half is what diffusers' own model tests check, with selection on at a ratio of one: its wheel ships none.
"""

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig, inject_adapter_in_model

import shiva_ext

from .every_family import EVERY

every_family = pytest.mark.parametrize("name", EVERY)


def make(name: str, dtype=torch.float32):
    build, inputs, artifact = EVERY[name]
    model = build().to(dtype)
    source, call = artifact(model), inputs(model)
    source.router.to(dtype)
    for key, value in call.items():
        if torch.is_tensor(value) and value.is_floating_point() and key != "timestep":
            call[key] = value.to(dtype)
    return model.requires_grad_(False), source, call


def add_lora(model, dora: bool) -> None:
    torch.manual_seed(4)
    # PEFT's DoRA has no form for a convolution without a bias, which is Sana's conv_point.
    targets = ["to_q", "to_v", "net.2"] + ([] if dora else ["conv_point"])
    config = LoraConfig(r=2, lora_alpha=2, target_modules=targets, use_dora=dora)
    inject_adapter_in_model(config, model, adapter_name="style")
    for key, p in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(p, std=0.1)


@every_family
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@torch.no_grad()
def test_an_adapter_of_the_users_may_come_before_or_after(name, dora):
    model, source, inputs = make(name)
    plain = model(**inputs)[0]
    with shiva_ext.enable(model, source):
        pruned = model(**inputs)[0]
        add_lora(model, dora)
        after = model(**inputs)[0]
    tuned = model(**inputs)[0]
    other, source, inputs = make(name)
    add_lora(other, dora)
    assert torch.equal(other(**inputs)[0], tuned)
    with shiva_ext.enable(other, source):
        before = other(**inputs)[0]
    assert torch.equal(before, after)
    assert not torch.equal(after, pruned) and not torch.equal(tuned, plain) and not torch.equal(after, tuned)
    assert torch.equal(other(**inputs)[0], tuned)


@every_family
@torch.no_grad()
def test_int8_weights(name):
    quantization = pytest.importorskip("torchao.quantization")
    model, source, inputs = make(name, torch.bfloat16)
    with shiva_ext.enable(model, source) as handle:
        wanted = handle.record() and model(**inputs)[0]
        kept = handle.records[0]["kept"]
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with shiva_ext.enable(model, source) as handle:
        handle.record()
        got = model(**inputs)[0]
        also = handle.records[0]["kept"]
    assert got.isfinite().all() and {k: v.shape for k, v in also.items()} == {k: v.shape for k, v in kept.items()}
    shared = [
        len(set(a.tolist()) & set(b.tolist())) / len(a) for i in kept for a, b in zip(kept[i], also[i], strict=True)
    ]
    assert sum(shared) / len(shared) > 0.7  # random weights: scores lie close to each other
    error = (got - wanted).float().square().mean() / wanted.float().square().mean()
    assert error < 0.5, error


@every_family
@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
@torch.no_grad()
def test_group_offloading(name, level):
    model, source, inputs = make(name)
    with shiva_ext.enable(model, source):
        wanted = model(**inputs)[0]
    other, source, inputs = make(name)
    blocks = dict(num_blocks_per_group=1) if level == "block_level" else {}
    apply_group_offloading(other, torch.device("cpu"), torch.device("cpu"), offload_type=level, **blocks)
    for _ in range(2):
        with shiva_ext.enable(other, source):
            torch.testing.assert_close(other(**inputs)[0], wanted, rtol=1e-4, atol=1e-4)


@every_family
@torch.no_grad()
def test_layerwise_casting(name):
    model, source, inputs = make(name)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    with shiva_ext.enable(model, source) as handle:
        handle.record()
        assert model(**inputs)[0].isfinite().all() and len(handle.records[0]["kept"]) > 1


# With selection on at a ratio of one.


@every_family
def test_it_is_deterministic_and_keeps_its_type(name):
    model, source, inputs = make(name, torch.bfloat16)
    with shiva_ext.enable(model, source, ratio=1.0), torch.no_grad():
        first, second = model(**inputs)[0], model(**inputs)[0]
        as_object = model(**{**inputs, "return_dict": True}).sample
    assert torch.equal(first, second) and torch.equal(first, as_object) and first.dtype == torch.bfloat16


@every_family
@torch.no_grad()
def test_it_is_saved_and_read_as_the_plain_model(name, tmp_path):
    model, source, inputs = make(name)
    names, wanted = list(model.state_dict()), model(**inputs)[0]
    with shiva_ext.enable(model, source, ratio=1.0):
        assert list(model.state_dict()) == names
        model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval().requires_grad_(False)
    assert list(again.state_dict()) == names
    with shiva_ext.enable(again, source, ratio=1.0):
        torch.testing.assert_close(again(**inputs)[0], wanted, rtol=1e-5, atol=1e-5)


@every_family
def test_it_trains_and_checkpointing_gives_the_same_gradients(name):
    found = []
    for checkpointing in (False, True):
        model, source, inputs = make(name)
        model.requires_grad_(True)
        if checkpointing:
            model.enable_gradient_checkpointing()
        with shiva_ext.enable(model, source, ratio=1.0):
            model(**inputs)[0].square().mean().backward()
        found.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert len(found[0]) > 20 and found[0].keys() == found[1].keys()
    for key, grad in found[0].items():
        torch.testing.assert_close(found[1][key], grad, rtol=1e-4, atol=1e-5, msg=key)


@every_family
@torch.no_grad()
def test_attention_processors_and_back_ends_can_be_changed(name):
    model, source, inputs = make(name)
    wanted = model(**inputs)[0]
    with shiva_ext.enable(model, source, ratio=1.0):
        if hasattr(model, "set_attn_processor"):
            model.set_attn_processor(model.attn_processors)
        if hasattr(model, "set_attention_backend") and name not in ("sd3", "pixart", "dit", "sana"):
            model.set_attention_backend("_native_math")
        torch.testing.assert_close(model(**inputs)[0], wanted, rtol=1e-4, atol=1e-4)
    with shiva_ext.enable(model, source):
        assert model(**inputs)[0].isfinite().all()
