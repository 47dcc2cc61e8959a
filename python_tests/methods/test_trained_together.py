"""DiffCR, DyDiT and SparseDiT beside what else users put on a model; with weights that were not trained."""

import contextlib

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from models.every_family import EVERY
from models.tiny import make_inputs, make_model
from peft import LoraConfig, inject_adapter_in_model
from torch._dynamo.testing import CompileCounter

import shiva_ext
from shiva_ext import hooks
from shiva_ext.methods import TRAINED, DiffCR, DyDiT, SparseDiT
from shiva_ext.methods.parts import mean_attention
from shiva_ext.models import adapter_for
from shiva_ext.training.method_trainer import MethodPass

from .test_trained import SIX, changed, fresh, output

TWO = ("pool", "generate", "recover", "generate", "sparse", "recover")
METHODS = {
    "diffcr": (DiffCR(), dict(keep=0.5)),
    "dydit": (DyDiT(groups=8), dict(heads__bias=-1.0, channels__bias=-1.0, up__bias=0.0)),
    "sparsedit": (SparseDiT(high=0.75, low=0.5, roles=TWO), {}),
}
every_method = pytest.mark.parametrize("name", TRAINED)


def make(name, **overrides):
    """A model of six layers, and the method with about half of it left out."""
    model = make_model(**SIX, **overrides)
    method, weights = METHODS[name]
    artifact = changed(fresh(method, model), **weights)
    generator = torch.Generator().manual_seed(4)
    for key, value in artifact.tensors.items():  # recovery that does more than pass on
        if key.startswith(("sparse.", "dense.", "position.")):
            artifact.tensors[key] = value + 0.1 * torch.randn(value.shape, generator=generator)
    return model, artifact


@every_method
@pytest.mark.parametrize("number", [2, 5])
def test_checkpointing_gives_the_same_gradients(name, number):
    """Also of the method's weights, and with several stretches on the coarse grid."""
    found = []
    for checkpointing in (False, True):
        model, artifact = make(name)
        if checkpointing:
            model.enable_gradient_checkpointing()
        source = artifact.source(model)
        source.weights.requires_grad_(True)
        model.requires_grad_(True)
        state = hooks.SelectionState(source, adapter_for(model))
        hooks.attach(model, state)
        state.at(0.7, fixed=True)
        state.trainer = MethodPass(state)
        torch.manual_seed(number)
        loss = model(**make_inputs(sigma=0.7))[0].square().mean()
        loss.backward()
        hooks.detach(model)
        weights = [*model.named_parameters(), *source.weights.named_parameters()]
        found.append({key: p.grad for key, p in weights if p.grad is not None})
    assert len(found[0]) > 50 and found[0].keys() == found[1].keys()
    for key, grad in found[0].items():
        torch.testing.assert_close(found[1][key], grad, rtol=1e-4, atol=1e-5, msg=key)


@every_method
@pytest.mark.parametrize("skipped", [[0], [1], [2], [3], [4], [5], [1, 2], [2, 3, 4]], ids=str)
@torch.no_grad()
def test_skip_layer_guidance_runs(name, skipped):
    """A stretch whose first or last block is skipped runs on all tokens."""
    model, artifact = make(name)
    with shiva_ext.enable(model, artifact):
        whole = model(**make_inputs())[0]
        part = model(**make_inputs(), skip_layers=skipped)[0]
        again = model(**make_inputs())[0]
    assert part.isfinite().all() and not torch.equal(part, whole) and torch.equal(again, whole)


@every_method
@torch.no_grad()
def test_the_weights_follow_the_model(name):
    """Enabled on one device, run on another: the method's weights come along, and their outputs are there."""
    model, artifact = make(name)
    with shiva_ext.enable(model, artifact) as handle:
        model.to("meta")
        inputs = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in make_inputs().items()}
        handle.at(0.7)
        with contextlib.suppress(RuntimeError, NotImplementedError):  # values decide, and meta tensors have none
            model(**inputs)
        assert all(p.device.type == "meta" for p in handle.state.selector.weights.parameters())


@every_method
@torch.no_grad()
def test_offloading(name):
    model, artifact = make(name)
    wanted = output(model, artifact)
    cpu_offload(model, torch.device("cpu"))
    torch.testing.assert_close(output(model, artifact), wanted, rtol=1e-4, atol=1e-4)
    for level in ("leaf_level", "block_level"):
        model, artifact = make(name)
        blocks = dict(num_blocks_per_group=1) if level == "block_level" else {}
        apply_group_offloading(model, torch.device("cpu"), torch.device("cpu"), offload_type=level, **blocks)
        torch.testing.assert_close(output(model, artifact), wanted, rtol=1e-4, atol=1e-4)


@every_method
@torch.no_grad()
def test_layerwise_casting(name):
    model, artifact = make(name)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert output(model, artifact).isfinite().all()


@every_method
@torch.no_grad()
def test_a_users_lora_counts(name):
    model, artifact = make(name)
    config = LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out.0", "net.0.proj", "net.2"])
    torch.manual_seed(0)
    inject_adapter_in_model(config, model, adapter_name="mine")
    layers = [m for m in model.modules() if hasattr(m, "lora_B")]
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B["mine"].weight, std=0.1)
    got = output(model, artifact)
    for layer in layers:
        layer.merge()
    torch.testing.assert_close(got, output(model, artifact), rtol=1e-4, atol=1e-4)


@every_method
@torch.no_grad()
def test_two_attentions_in_a_block(name):
    """SD3.5: what is left out is left out of both."""
    model, artifact = make(name, dual_attention_layers=(1, 2))
    assert output(model, artifact).isfinite().all()
    if name != "dydit":
        return
    routers = artifact.source(model).weights
    assert [each.attentions for each in routers] == [1, 2, 2, 1, 1, 1]


@every_method
@pytest.mark.parametrize("size", [6, 12])
@torch.no_grad()
def test_other_image_sizes(name, size):
    model, artifact = make(name)
    assert output(model, artifact, size=size).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["diffcr", "sparsedit"])
def test_compiles_into_one_graph(name):
    model, artifact = make(name)
    wanted = output(model, artifact)
    torch._dynamo.reset()
    counter = CompileCounter()
    with shiva_ext.enable(model, artifact) as handle:
        handle.at(0.7)
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        torch.testing.assert_close(compiled(**make_inputs())[0], wanted, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("family", EVERY)
@torch.no_grad()
def test_diffcr_is_for_every_family(family):
    build, inputs, _ = EVERY[family]
    model = build()
    inputs = inputs(model) | {"return_dict": False}
    dense = model(**inputs)[0]
    with shiva_ext.enable(model, changed(fresh(DiffCR(), model), keep=0.5)):
        pruned = model(**inputs)[0]
    assert pruned.shape == dense.shape and pruned.isfinite().all() and not torch.equal(pruned, dense)


@pytest.mark.parametrize("name", ["dydit", "sparsedit"])
def test_another_attention_processor_is_refused(name):
    class Silent:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return torch.zeros_like(hidden_states)

    model, artifact = make(name)
    model.set_attn_processor(Silent())
    with pytest.raises(TypeError, match="processor Silent"):
        output(model, artifact)


@pytest.mark.parametrize("name", ["dydit", "sparsedit"])
def test_forward_chunking_is_refused(name):
    model, artifact = make(name)
    model.enable_forward_chunking(4, dim=1)
    with pytest.raises(ValueError, match="turn forward chunking off"):
        shiva_ext.enable(model, artifact)


@every_method
def test_export_is_refused(name):
    model, artifact = make(name)
    with (
        shiva_ext.enable(model, artifact) as handle,
        pytest.raises(RuntimeError, match="cannot be exported"),
        handle.at(0.7).exportable(),
    ):
        pass


@every_method
def test_enabling_draws_nothing(name):
    model, artifact = make(name)
    torch.manual_seed(0)
    wanted = torch.randn(1)
    torch.manual_seed(0)
    with shiva_ext.enable(model, artifact):
        assert torch.equal(torch.randn(1), wanted)


@torch.no_grad()
def test_the_mean_of_many_large_tokens_does_not_overflow():
    attn = make_model(**SIX).transformer_blocks[0].attn
    for layer in (attn.to_v, attn.add_v_proj):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.constant_(layer.bias, 20.0)
    x, text = torch.zeros(1, 4096, 128).half(), torch.zeros(1, 8, 128).half()
    assert all(each.isfinite().all() for each in mean_attention(attn.half(), x, text))
