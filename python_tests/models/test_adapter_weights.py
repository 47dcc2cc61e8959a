"""The tuned weights of an artefact: merged for inference, taken back bit for bit, beside any adapters of the user's."""

import warnings

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

import shiva_ext
from shiva_ext import adapter_weights

from .tiny import WIDTH, assert_unchanged, make_artifact, make_inputs, make_model, make_pipeline, snapshot

TARGETS = ["attn.to_q", "attn.to_out.0", "attn.add_k_proj", "ff.net.0.proj", "ff.net.2", "ff_context.net.2"]


def make_adapter(folder, dora=True, layers=4, save_dtype=torch.float32):
    """Write an adapter with random weights; returns the model with the adapter unmerged."""
    model = make_model(num_layers=layers)
    config = LoraConfig(r=4, lora_alpha=8, use_dora=dora, target_modules=TARGETS)
    adapter_weights.inject(model, config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                noise = 0.2 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_((parameter * (1 + noise) if "magnitude" in name else noise).to(save_dtype))
    folder.mkdir(parents=True)
    state = get_peft_model_state_dict(model, adapter_name=adapter_weights.NAME)
    save_file({k: v.to(save_dtype).contiguous() for k, v in state.items()}, folder / "adapter_model.safetensors")
    config.save_pretrained(str(folder))
    return model.eval()


@torch.no_grad()
def call(model, dtype=torch.float32):
    return model(**make_inputs(dtype=dtype))[0]


def load_style(model, name="style", **options):
    torch.manual_seed(4)
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False, **options)
    model.add_adapter(config, name)
    return model.eval()


@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("save_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_weights_give_the_unmerged_output(dora, save_dtype, tmp_path, model):
    unmerged = make_adapter(tmp_path / "adapter", dora, save_dtype=save_dtype)
    before, dense, wanted = snapshot(model), call(model), call(unmerged)
    source = make_artifact(adapter=tmp_path / "adapter")
    shiva_ext.enable(model, source, ratio=1.0)
    output = call(model)
    assert (wanted - dense).abs().max() > 0.1
    torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-4)
    assert list(model.state_dict()) == list(before["weights"])  # merged: no layer was added
    shiva_ext.disable(model)
    assert_unchanged(model, before)
    assert torch.equal(call(model), dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models_get_the_merged_weights_rounded(dtype, tmp_path):
    unmerged = make_adapter(tmp_path / "adapter")
    model = make_model().to(dtype)
    before = snapshot(model)
    shiva_ext.enable(model, make_artifact(adapter=tmp_path / "adapter"))
    for layer in (0, 3):
        name = f"transformer_blocks.{layer}.ff.net.2"
        tuned = unmerged.get_submodule(name)
        tuned.merge()
        weight = model.get_submodule(name).weight
        assert weight.dtype == dtype
        torch.testing.assert_close(weight.float(), tuned.base_layer.weight, rtol=2**-6, atol=2**-8)
    assert call(model, dtype).isfinite().all()
    shiva_ext.disable(model)
    assert_unchanged(model, before)


def test_enabling_without_the_adapter_leaves_the_weights(tmp_path, model):
    make_adapter(tmp_path / "adapter")
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    shiva_ext.enable(model, make_artifact(adapter=tmp_path / "adapter"), adapter=False)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_enabling_twice_merges_once(tmp_path, model):
    make_adapter(tmp_path / "adapter")
    before, source = snapshot(model), make_artifact(adapter=tmp_path / "adapter")
    shiva_ext.enable(model, source)
    once = call(model)
    shiva_ext.enable(model, source)
    assert torch.equal(call(model), once)
    shiva_ext.disable(model)
    assert_unchanged(model, before)


def test_a_saved_artefact_carries_its_adapter(tmp_path, model):
    make_adapter(tmp_path / "adapter")
    source = make_artifact(adapter=tmp_path / "adapter")
    shiva_ext.enable(model, source)
    wanted = call(model)
    shiva_ext.disable(model)
    once = shiva_ext.load(shiva_ext.save(source, tmp_path / "once"))
    twice = shiva_ext.load(shiva_ext.save(once, tmp_path / "twice"))
    shiva_ext.save(twice, tmp_path / "twice")  # onto itself
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "twice" / "adapter" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
    shiva_ext.enable(model, tmp_path / "twice")
    assert torch.equal(call(model), wanted)


def test_frozen_and_trainable_weights_stay_so(tmp_path, model):
    make_adapter(tmp_path / "adapter")
    model.requires_grad_(False)
    model.proj_out.requires_grad_(True)
    before = snapshot(model)
    shiva_ext.enable(model, make_artifact(adapter=tmp_path / "adapter"))
    assert {k: p.requires_grad for k, p in model.named_parameters()} == {
        k: trainable for k, (_, _, trainable) in before["parameters"].items()
    }
    shiva_ext.disable(model)
    assert_unchanged(model, before)


USERS_ADAPTERS = {
    "one": lambda model: load_style(model),
    "one of our name": lambda model: load_style(model, adapter_weights.NAME),
    "a DoRA": lambda model: load_style(model, use_dora=True),
    "two, weighted": lambda model: load_style(load_style(model), "more").set_adapters(["style", "more"], [0.3, 0.7]),
    "disabled": lambda model: load_style(model).disable_adapters(),
    "fused": lambda model: load_style(model).fuse_lora(),
}


@pytest.mark.parametrize("case", USERS_ADAPTERS)
def test_the_users_own_adapters_are_left_as_they_are(case, tmp_path, model):
    make_adapter(tmp_path / "adapter")
    USERS_ADAPTERS[case](model)
    before, dense, active = snapshot(model), call(model), model.active_adapters()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shiva_ext.enable(model, make_artifact(adapter=tmp_path / "adapter"), ratio=1.0)
    assert model.active_adapters() == active and (call(model) - dense).abs().max() > 0.1
    shiva_ext.disable(model)
    assert_unchanged(model, before)
    assert torch.equal(call(model), dense)


def test_a_lora_adds_to_the_merged_weights(tmp_path, model):
    make_adapter(tmp_path / "adapter")
    load_style(model)
    layer, x = model.transformer_blocks[1].attn.to_q, torch.randn(3, WIDTH)
    added = layer(x) - layer.base_layer(x)
    weight = layer.base_layer.weight.clone()
    shiva_ext.enable(model, make_artifact(adapter=tmp_path / "adapter"))
    assert not torch.equal(layer.base_layer.weight, weight)
    torch.testing.assert_close(layer(x) - layer.base_layer(x), added, rtol=1e-4, atol=1e-4)


def test_a_fused_lora_can_be_unfused_after_disabling(tmp_path, model):
    make_adapter(tmp_path / "adapter")
    dense = call(model)
    load_style(model).fuse_lora()
    shiva_ext.enable(model, make_artifact(adapter=tmp_path / "adapter")).disable()
    model.unfuse_lora()
    model.disable_adapters()
    torch.testing.assert_close(call(model), dense, rtol=1e-4, atol=1e-4)


def test_a_lora_loaded_while_enabled_survives_disabling(tmp_path, model):
    make_adapter(tmp_path / "adapter")
    handle = shiva_ext.enable(model, make_artifact(adapter=tmp_path / "adapter"))
    load_style(model)
    handle.disable()
    assert torch.equal(call(model), call(load_style(make_model())))


def test_a_model_cast_while_enabled_gets_its_weights_back_in_its_dtype(tmp_path, model):
    make_adapter(tmp_path / "adapter")
    handle = shiva_ext.enable(model, make_artifact(adapter=tmp_path / "adapter"))
    model.to(torch.bfloat16)
    handle.disable()
    assert torch.equal(call(model, torch.bfloat16), call(make_model().to(torch.bfloat16), torch.bfloat16))


@pytest.mark.parametrize(("layers", "lacks"), [(3, "the model has no 'transf"), (5, "the adapter has no 'transf")])
def test_an_adapter_of_another_model_is_refused_and_the_model_untouched(layers, lacks, tmp_path):
    make_adapter(tmp_path / "adapter")
    model = make_model(num_layers=layers)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"trained for another model: {lacks}.*adapter=False"):
        shiva_ext.enable(model, make_artifact(num_layers=layers, adapter=tmp_path / "adapter"))
    assert_unchanged(model, before)


class SealedScheduler(FlowMatchEulerDiscreteScheduler):
    def __setattr__(self, name, value):
        if name in ("set_timesteps", "step"):
            raise AttributeError("sealed")
        super().__setattr__(name, value)


def test_an_error_after_the_merge_undoes_it(tmp_path, model):
    make_adapter(tmp_path / "adapter")
    pipe = make_pipeline(model, scheduler=SealedScheduler())
    before = snapshot(model)
    with pytest.raises(AttributeError, match="sealed"):
        shiva_ext.enable(pipe, make_artifact(adapter=tmp_path / "adapter"))
    assert_unchanged(model, before)
    with pytest.raises(RuntimeError, match="not enabled"):
        shiva_ext.get_handle(model)


def test_merging_draws_no_random_numbers(tmp_path, model):
    make_adapter(tmp_path / "adapter")
    torch.manual_seed(0)
    wanted = torch.randn(3)
    source = make_artifact(adapter=tmp_path / "adapter")
    torch.manual_seed(0)
    shiva_ext.enable(model, source)
    assert torch.equal(torch.randn(3), wanted)


def artefact_with(folder, seed=7, **metadata):
    """An artefact on disk whose adapter has random weights of its own."""
    unmerged = make_adapter(folder / "made", dora=bool(seed % 2))
    with torch.no_grad():
        for name, parameter in unmerged.named_parameters():
            if "lora_" in name:
                parameter.mul_(1 + 0.1 * seed)
    state = get_peft_model_state_dict(unmerged, adapter_name=adapter_weights.NAME)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "made" / "adapter_model.safetensors")
    artifact = make_artifact(adapter=folder / "made")
    artifact.metadata |= metadata
    artifact.save(folder / "artefact")


def weights_with(folder, dtype):
    """The model's weights where that artefact alone is enabled, float32."""
    model = make_model().to(dtype)
    with shiva_ext.enable(model, folder / "artefact"):
        return {name: value.float() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_artefacts_tuning_is_added_weight_by_weight(adapter, dtype, tmp_path):
    artefact_with(tmp_path / "a", 7), artefact_with(tmp_path / "b", 4)
    first, second = (weights_with(tmp_path / name, dtype) for name in "ab")
    model = make_model().to(dtype)
    original, before = {name: value.float() for name, value in model.state_dict().items()}, snapshot(model)
    shiva_ext.enable(model, tmp_path / "a" / "artefact", tuned=tmp_path / "b" / "artefact", adapter=adapter)
    changed = 0
    for name, value in model.state_dict().items():
        wanted = second[name] + (first[name] - original[name] if adapter else 0)
        changed += not torch.equal(wanted, original[name])
        # The sum is rounded once, to half a unit in the last place; float32's own order of sums beside it.
        bound = dict(rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
        torch.testing.assert_close(value.float(), wanted, **bound)
    assert changed >= len(TARGETS)
    shiva_ext.disable(model)
    assert_unchanged(model, before)


def test_tuning_that_cannot_be_added_is_refused_and_changes_nothing(tmp_path):
    artefact_with(tmp_path / "a"), artefact_with(tmp_path / "guided", training={"guidance": 2.0})
    make_artifact().save(tmp_path / "untuned")
    model, source = make_model(), tmp_path / "a" / "artefact"
    before = snapshot(model)
    for tuned, error, said in (
        (tmp_path / "untuned", ValueError, "without tuned weights, so it adds nothing"),
        (tmp_path / "guided" / "artefact", ValueError, "give guidance of 2 in one call"),
        (tmp_path / "nowhere", Exception, "nowhere"),
    ):
        with pytest.raises(error, match=said):
            shiva_ext.enable(model, source, tuned=tuned)
        assert_unchanged(model, before)
    with pytest.raises(ValueError, match="selects no tokens; .*tuned"):
        shiva_ext.enable(model, shiva_ext.caches.FORA(2), tuned=source)
    with pytest.raises(ValueError, match="trained for another model"):
        shiva_ext.enable(make_model(num_layers=3), shiva_ext.selection.RandomSelector(0.5), tuned=source)


def test_tuning_goes_with_any_selection(tmp_path):
    artefact_with(tmp_path / "a")
    tuned, model = weights_with(tmp_path / "a", torch.float32), make_model()
    with shiva_ext.enable(model, shiva_ext.selection.RandomSelector(0.5), tuned=tmp_path / "a" / "artefact"):
        assert all(torch.equal(value, tuned[name]) for name, value in model.state_dict().items())
