"""Layers that share a router and what it selects."""

import json

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import shiva_ext
from shiva_ext import hooks
from shiva_ext.models import adapter_for
from shiva_ext.selection import RandomSelector, RatioTable, get_estimator
from shiva_ext.training.stages import run_student, run_teacher

from .tiny import LAYERS, WIDTH, N, make_artifact, make_inputs, make_model, run_by_hand, varying_table

PAIRED = RatioTable([0.2, 0.8], torch.tensor([[N, 8, 8, 4], [N, 12, 12, 6]]) / N)


def shared(table=PAIRED, **options):
    return make_artifact(table, share_selection=True, **options)


def count_router_calls(artifact) -> list[int]:
    calls, forward = [], artifact.router.forward
    artifact.router.forward = lambda layer, *args: calls.append(layer) or forward(layer, *args)
    return calls


@torch.no_grad()
def run(model, artifact, sigma=0.7, **options):
    inputs = make_inputs(sigma=sigma)
    with shiva_ext.enable(model, artifact, **options) as handle:
        handle.record()
        return model(**inputs)[0], handle.records[0]["kept"]


def test_a_pair_keeps_the_tokens_of_its_first_layer_and_scores_once():
    model, artifact = make_model(), shared()
    calls = count_router_calls(artifact)
    output, kept = run(model, artifact)
    assert calls == [1, 3]
    assert torch.equal(kept[1], kept[2]) and kept[3].shape == (2, 6)
    by_hand, _ = run_by_hand(model, kept, make_inputs(sigma=0.7))
    torch.testing.assert_close(output, by_hand, rtol=1e-5, atol=1e-5)
    alone, own = run(model, make_artifact(PAIRED))
    assert torch.equal(own[1], kept[1]) and not torch.equal(own[2], kept[2])
    assert not torch.equal(alone, output)


def test_the_option_overrides_the_artefact_and_leaves_it_alone():
    model, artifact = make_model(), make_artifact(PAIRED)
    assert torch.equal(run(model, artifact, share_selection=True)[0], run(model, shared())[0])
    assert torch.equal(run(model, shared(), share_selection=False)[0], run(model, artifact)[0])
    assert not artifact.share_selection


def test_counts_that_differ_within_a_pair_become_equal_with_the_same_mean():
    source = shared(varying_table())
    model = make_model()
    shiva_ext.enable(model, source)
    rows = shiva_ext.summary(model, steps=source.table.sigmas)
    assert all(row[1] == row[2] for row in rows.kept) and any(row[2] != row[3] for row in rows.kept)
    cells = (LAYERS - 1) * len(source.table.sigmas)
    assert rows.mean_ratio == pytest.approx(source.table.mean(), abs=2 / (N * cells))


def test_the_summary_counts_the_router_once_a_pair():
    model, router = make_model(), 2 * 16 * N * (WIDTH + 1)
    alone = shiva_ext.summary(enabled(model, make_artifact(PAIRED)), steps=[0.7])
    together = shiva_ext.summary(enabled(model, shared()), steps=[0.7])
    assert alone.kept == together.kept and alone.flops[0] - together.flops[0] == router


def enabled(model, artifact):
    shiva_ext.enable(model, artifact)
    return model


def test_a_skipped_first_layer_leaves_the_choice_to_the_second():
    model, artifact = make_model(), shared()
    calls = count_router_calls(artifact)
    with torch.no_grad(), shiva_ext.enable(model, artifact) as handle:
        handle.record()
        model(**make_inputs(), skip_layers=[1])
    assert calls == [2, 3] and list(handle.records[0]["kept"]) == [2, 3]


def test_nothing_is_carried_from_call_to_call():
    model, artifact = make_model(), shared()
    with torch.no_grad(), shiva_ext.enable(model, artifact) as handle:
        first = model(**make_inputs(sigma=0.7))[0]
        model(**make_inputs(batch=3, sigma=0.1, seed=9, size=12))
        assert torch.equal(model(**make_inputs(sigma=0.7))[0], first)
    assert handle.state.chosen == {}


def test_it_survives_a_round_trip_and_older_files_lack_it(tmp_path):
    shared().save(tmp_path)
    assert shiva_ext.load(tmp_path).share_selection
    config = json.loads((tmp_path / "config.json").read_text())
    del config["share_selection"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not shiva_ext.load(tmp_path).share_selection


def test_a_baseline_has_no_router_to_share():
    with pytest.raises(ValueError, match="share_selection .* for Shiva's artefacts"):
        shiva_ext.enable(make_model(), RandomSelector(0.5), share_selection=True)


def test_compiled_equals_eager_in_one_graph():
    torch.compiler.reset()
    model = make_model()
    handle = shiva_ext.enable(model, shared()).at(0.7)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(compiled(**make_inputs())[0], model(**make_inputs())[0])
    assert counter.frame_count == 1 and handle.num_hooked == 3
    torch.compiler.reset()


@pytest.mark.parametrize("estimator", ["counterfactual", "residual"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_selects_once_and_checkpointing_changes_no_gradient(estimator, checkpointing):
    results = []
    for on in (False, checkpointing):
        model, source = make_model(), shared()
        source.router.requires_grad_(True)
        if on:
            model.enable_gradient_checkpointing()
        state = hooks.SelectionState(source, adapter_for(model))
        hooks.attach(model, state)
        inputs = {k: v for k, v in make_inputs().items() if k != "return_dict"}
        teacher = run_teacher(model, state, **inputs)
        ratios = torch.tensor([1.0, 0.4, 0.6, 0.7], requires_grad=True)
        torch.manual_seed(0)
        noisy = get_estimator(estimator, noise_fraction=2.0)  # one draw must serve both layers
        output, student = run_student(model, state, noisy, ratios, teacher, **inputs)
        assert torch.equal(student.kept[1], student.kept[2]) and student.kept[1].shape == (2, 8)
        (output - teacher.output).square().mean().backward()
        assert ratios.grad[1] == ratios.grad[2] != 0
        results.append([ratios.grad, *(p.grad for p in source.router.parameters())])
    for got, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, wanted)
