"""enable, disable and the handle: what they change, what they give back, and what they refuse."""

import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

import shiva_ext
from shiva_ext.models.base import ADAPTERS
from shiva_ext.selection import RandomSelector, RatioPolicy, RatioTable

from .tiny import (
    LAYERS,
    N,
    assert_unchanged,
    make_artifact,
    make_inputs,
    make_model,
    make_pipeline,
    pipeline_inputs,
    snapshot,
    varying_table,
)

SCHEDULER_METHODS = {"set_timesteps", "set_begin_index", "step"}


class Doubler(ModelHook):
    """Somebody else's hook, which can be told apart from ours."""

    def post_forward(self, module, output):
        return tuple(part if part is None else 2 * part for part in output)


@torch.no_grad()
def call(model, **options):
    return model(**make_inputs(**options))[0]


def test_disable_restores_outputs_weights_and_attributes(model, artifact):
    before, dense = snapshot(model), call(model)
    handle = shiva_ext.enable(model, artifact)
    assert handle.num_hooked == LAYERS - 1
    assert not torch.equal(call(model), dense)
    assert list(model.state_dict()) == list(before["weights"])
    shiva_ext.disable(model)
    assert_unchanged(model, before)
    assert torch.equal(call(model), dense)


def test_disable_restores_the_pipeline_and_its_scheduler(pipe, artifact):
    model, scheduler = snapshot(pipe.transformer), dict(vars(pipe.scheduler))
    shiva_ext.enable(pipe, artifact)
    shiva_ext.disable(pipe)
    assert_unchanged(pipe.transformer, model)
    assert vars(pipe.scheduler) == scheduler


def test_enabling_twice_is_enabling_once(pipe, artifact):
    before = snapshot(pipe.transformer)
    shiva_ext.enable(pipe, artifact)
    once = pipe(**pipeline_inputs())[0]
    first, second = shiva_ext.get_handle(pipe), shiva_ext.enable(pipe, artifact)
    second.record()
    assert torch.equal(pipe(**pipeline_inputs())[0], once)
    assert len(second.records) == 3
    assert all(len(block._diffusers_hook.hooks) == 1 for block in list(pipe.transformer.transformer_blocks)[1:])
    first.disable()  # it has been replaced: this must not take the second one off
    assert torch.equal(pipe(**pipeline_inputs())[0], once)
    second.disable()
    second.disable()
    assert_unchanged(pipe.transformer, before)
    assert not SCHEDULER_METHODS & set(vars(pipe.scheduler))


def test_enabling_again_replaces_the_settings(model, artifact):
    shiva_ext.enable(model, artifact, ratio=0.5)
    handle = shiva_ext.enable(model, RandomSelector(0.25)).record()
    call(model)
    assert all(index.shape[1] == N // 4 for index in handle.records[0]["kept"].values())


@pytest.mark.parametrize(("options", "tile"), [({"tile": 1}, 1), ({}, 16), ({"tile": 64}, 64)])
def test_ratio_fixes_one_share_and_budget_scales_the_schedule(model, options, tile):
    source = make_artifact(varying_table())
    assert shiva_ext.summary(enabled(model, source, ratio=0.25)).mean_ratio == 0.25
    larger = make_model(sample_size=64, pos_embed_max_size=32)
    cells = (LAYERS - 1) * len(source.table.sigmas)
    for budget in (0.4, 0.6, 0.8):
        # Exact, to the nearest tile of the whole schedule, at the image size that the model is configured for.
        summary = shiva_ext.summary(enabled(larger, source, budget=budget, **options), steps=source.table.sigmas)
        assert summary.num_tokens == 1024
        assert summary.mean_ratio == pytest.approx(budget, abs=0.5 * tile / (1024 * cells) + 1e-6)
        assert all(k % tile == 0 for row in summary.kept for k in row)
        assert tile > 1 or len(set(summary.kept)) == len(source.table.sigmas)
    assert source.table == varying_table()


def test_a_tile_alone_keeps_the_schedules_own_mean():
    source = make_artifact(varying_table())
    larger = make_model(sample_size=64, pos_embed_max_size=32)
    cells = (LAYERS - 1) * len(source.table.sigmas)
    summary = shiva_ext.summary(enabled(larger, source, tile=32), steps=source.table.sigmas)
    assert summary.mean_ratio == pytest.approx(source.table.mean(), abs=0.5 * 32 / (1024 * cells) + 1e-6)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_max_distinct_k_bounds_the_sets_of_token_counts(most):
    larger = make_model(sample_size=64, pos_embed_max_size=32)
    shiva_ext.enable(larger, make_artifact(varying_table()), budget=0.5, max_distinct_k=most)
    summary = shiva_ext.summary(larger, steps=100)
    assert len(set(summary.kept)) == most


def test_the_samplers_own_levels_make_the_budget_exact():
    levels = [1.0, 0.93, 0.8, 0.41, 0.02]
    larger = make_model(sample_size=64, pos_embed_max_size=32)
    policy = RatioPolicy(num_layers=LAYERS, target=0.7, hidden=8)
    for source in (make_artifact(varying_table()), make_artifact(varying_table(), policy=policy)):
        shiva_ext.enable(larger, source, budget=0.45, sigmas=levels)
        summary = shiva_ext.summary(larger, steps=levels)
        cells = (LAYERS - 1) * len(levels)
        assert summary.mean_ratio == pytest.approx(0.45, abs=0.5 * 16 / (1024 * cells) + 1e-6)


@pytest.mark.parametrize("change", [torch.set_default_device, torch.set_default_dtype])
def test_the_callers_defaults_do_not_move_the_counts(change):
    source, larger = make_artifact(varying_table()), make_model(sample_size=64, pos_embed_max_size=32)
    options = [dict(budget=0.55), dict(sigmas=[0.1, 0.6]), dict(ratio=0.6), dict(max_distinct_k=2), {}]
    wanted = [shiva_ext.summary(enabled(larger, source, tile=1, **each)).kept for each in options]
    change("meta" if change is torch.set_default_device else torch.bfloat16)
    try:
        got = [shiva_ext.summary(enabled(larger, source, tile=1, **each)).kept for each in options]
    finally:
        change(None if change is torch.set_default_device else torch.float32)
    assert got == wanted


def enabled(model, *args, **options):
    shiva_ext.enable(model, *args, **options)
    return model


def test_the_handle_is_a_context_manager_that_disables_after_an_error_too(model, artifact):
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), shiva_ext.enable(model, artifact):
        _ = 1 / 0
    assert_unchanged(model, before)
    shiva_ext.disable(model)  # harmless


def test_other_hooks_stay_when_ours_go(model, artifact):
    block = model.transformer_blocks[1]
    HookRegistry.check_if_exists_or_initialize(block).register_hook(Doubler(), "doubler")
    before, doubled = snapshot(model), call(model)
    shiva_ext.enable(model, artifact).disable()
    assert list(block._diffusers_hook.hooks) == ["doubler"]
    assert before["weights"].keys() == model.state_dict().keys() and torch.equal(call(model), doubled)

    handle = shiva_ext.enable(model, artifact)
    HookRegistry.check_if_exists_or_initialize(model.transformer_blocks[2]).register_hook(Doubler(), "later")
    handle.disable()
    assert not torch.equal(call(model), doubled)
    model.transformer_blocks[2]._diffusers_hook.remove_hook("later")
    assert torch.equal(call(model), doubled)


def test_a_fixed_noise_level_holds_for_calls_at_any_timestep(model):
    handle = shiva_ext.enable(model, make_artifact(varying_table())).record()
    handle.at(0.1)
    call(model, sigma=0.9)
    handle.at(0.9)
    call(model, sigma=0.1)
    counts = [{k: v.shape[1] for k, v in record["kept"].items()} for record in handle.records]
    table = varying_table()
    assert counts == [{k: n for k, n in enumerate(table.tokens(s, N)) if k} for s in (0.1, 0.9)]
    assert [record["timestep"] for record in handle.records] == [100.0, 900.0]
    with pytest.raises(ValueError, match="noise level in \\[0, 1\\]"):
        handle.at(500)


def test_recording_starts_afresh_and_stops(model, artifact):
    handle = shiva_ext.enable(model, artifact)
    call(model)
    assert handle.records == []
    for _ in range(2):
        handle.record()
        call(model, sigma=0.5)
        assert [record["timestep"] for record in handle.records] == [500.0]
    handle.record(False)
    call(model)
    assert len(handle.records) == 1
    kept = handle.records[0]["kept"]
    assert list(kept) == [1, 2, 3] and all(index.dtype == torch.int64 for index in kept.values())
    assert all((index[:, 1:] > index[:, :-1]).all() for index in kept.values())


def test_get_handle_needs_an_enabled_model(model, artifact):
    handle = shiva_ext.enable(model, artifact)
    assert shiva_ext.get_handle(model) is handle
    handle.disable()
    with pytest.raises(RuntimeError, match="call shiva_ext.enable"):
        shiva_ext.get_handle(model)


@pytest.mark.parametrize("thing", [None, 3, "a string", object()])
def test_what_is_not_a_model_is_refused(thing, artifact):
    with pytest.raises(TypeError, match="wanted a diffusers pipeline with a transformer"):
        shiva_ext.enable(thing, artifact)


def test_an_unknown_family_is_refused_with_those_that_are_known(artifact):
    class Unknown(nn.Module):
        pass

    with pytest.raises(TypeError, match=f"no adapter for Unknown; it knows .*{sorted(ADAPTERS)[0]}.*CONTRIBUTING"):
        shiva_ext.enable(Unknown(), artifact)


def test_a_subclass_of_a_known_family_is_known(artifact):
    model = make_model()
    model.__class__ = type("Mine", (type(model),), {})
    assert shiva_ext.enable(model, artifact).num_hooked == LAYERS - 1


class NoRatios:
    def scores(self, layer, x, sigma, conditioning):
        return x[..., 0]


class OwnRatios(NoRatios):
    def ratios(self, sigma):
        return (1.0,) + (0.5,) * (LAYERS - 1)


def foreign(**fields):
    source = make_artifact()
    for name, value in fields.items():
        setattr(source, name, value)
    return source


REFUSED = {
    "no source": (
        lambda: None,
        {},
        TypeError,
        "wanted an artefact's folder or hub id, a ShivaArtifact, a method of shiva_ext.methods, or a selector",
    ),
    "no ratios": (NoRatios, {}, TypeError, "selector with ratios\\(\\) and scores\\(\\)"),
    "missing folder": (lambda: "/no/such/folder", {}, FileNotFoundError, "neither a folder here nor a repository"),
    "another class": (lambda: foreign(model_class="Other"), {}, ValueError, "class Other \\(model: SD3Transformer2D"),
    "another depth": (lambda: make_artifact(num_layers=9), {}, ValueError, "num_layers 9 \\(model: 4\\)"),
    "torn table": (lambda: foreign(table=RatioTable.fixed(0.5, 3)), {}, ValueError, "ratios for 3 layers"),
    "missing adapter": (lambda: make_artifact(adapter="/no/adapter"), {}, FileNotFoundError, "adapter=False"),
    "ratio and budget": (make_artifact, dict(ratio=0.5, budget=0.5), ValueError, "ratio fixes one share everywhere"),
    "ratio 0": (make_artifact, dict(ratio=0.0), ValueError, "ratio is 0.0, wanted a share"),
    "ratio above 1": (make_artifact, dict(ratio=1.5), ValueError, "ratio is 1.5, wanted a share"),
    "budget 0": (make_artifact, dict(budget=0.0), ValueError, "budget is 0.0, wanted a share"),
    "budget above 1": (make_artifact, dict(budget=60), ValueError, "budget is 60, wanted a share"),
    "ratio for a baseline": (
        lambda: RandomSelector(0.5),
        dict(ratio=0.5),
        ValueError,
        "RandomSelector has its own ratios",
    ),
    "budget for a baseline": (lambda: RandomSelector(0.5), dict(budget=0.5), ValueError, "its own ratios"),
    "ratio for a selector": (OwnRatios, dict(ratio=0.5), ValueError, "its own ratios, give it others"),
    "tile 0": (make_artifact, dict(tile=0), ValueError, "tile is 0, wanted at least 1"),
    "tile and budget": (make_artifact, dict(tile=3, budget=0.5), ValueError, "tile is 3, wanted a divisor"),
    "ratio and levels": (make_artifact, dict(ratio=0.5, sigmas=[0.5]), ValueError, "give one or the other"),
    "level above 1": (make_artifact, dict(sigmas=[500.0]), ValueError, "sigma is 500.0, wanted a noise level"),
    "no distinct k": (make_artifact, dict(max_distinct_k=0), ValueError, "max_distinct_k is 0, wanted at least 1"),
    "distinct k of a baseline": (lambda: RandomSelector(0.5), dict(max_distinct_k=2), ValueError, "its own ratios"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_unfit_source_or_option_is_refused_and_the_model_untouched(case, pipe):
    make_source, options, error, message = REFUSED[case]
    model, scheduler = snapshot(pipe.transformer), dict(vars(pipe.scheduler))
    with pytest.raises(error, match=message):
        shiva_ext.enable(pipe, make_source(), **options)
    assert_unchanged(pipe.transformer, model)
    assert vars(pipe.scheduler) == scheduler


def test_a_model_without_a_block_to_hook_is_refused_and_untouched():
    pipe = make_pipeline(make_model(num_layers=1))
    before = snapshot(pipe.transformer)
    with pytest.raises(RuntimeError, match="no block was hooked: SD3Transformer2DModel has 1 blocks"):
        shiva_ext.enable(pipe, RandomSelector(0.5))
    assert_unchanged(pipe.transformer, before)
    assert not SCHEDULER_METHODS & set(vars(pipe.scheduler))


def test_a_refused_second_enable_leaves_no_half_enabled_model(pipe, artifact):
    before = snapshot(pipe.transformer)
    shiva_ext.enable(pipe, artifact)
    with pytest.raises(FileNotFoundError):
        shiva_ext.enable(pipe, make_artifact(adapter="/no/adapter"))
    shiva_ext.disable(pipe)
    assert_unchanged(pipe.transformer, before)
    assert not SCHEDULER_METHODS & set(vars(pipe.scheduler))


class CountingOffload(CpuOffload):
    """Accelerate's hook that fetches a model's weights before a call; here they come from `stored`, if that is set."""

    def __init__(self):
        super().__init__("cpu")
        self.fetched, self.stored = 0, None

    def pre_forward(self, module, *args, **kwargs):
        self.fetched += 1
        if self.stored:
            module.load_state_dict(self.stored)
        return super().pre_forward(module, *args, **kwargs)


@pytest.mark.parametrize("offloaded_first", [False, True])
def test_an_offload_hook_works_around_ours_and_stays_behind(model, artifact, offloaded_first):
    dense = call(model)
    with shiva_ext.enable(model, artifact):
        wanted = call(model)
    offload = CountingOffload()
    if offloaded_first:
        add_hook_to_module(model, offload)
    handle = shiva_ext.enable(model, artifact)
    if not offloaded_first:
        add_hook_to_module(model, offload)
    assert torch.equal(call(model), wanted) and offload.fetched >= 1
    handle.disable()
    before = offload.fetched
    assert torch.equal(call(model), dense) and offload.fetched == before + 1


def test_the_weights_are_fetched_before_the_conditioning_is_computed(model, artifact):
    with shiva_ext.enable(model, artifact):
        wanted = call(model)
    offload = CountingOffload()
    offload.stored = {name: weight.clone() for name, weight in model.state_dict().items()}
    add_hook_to_module(model, offload)
    shiva_ext.enable(model, artifact)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    assert torch.equal(call(model), wanted)
