"""torch.compile(fullgraph=True) of the transformer with the method on."""

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import shiva_ext
from shiva_ext.selection import RatioTable

from .tiny import N, make_artifact, make_inputs, make_model, make_pipeline, pipeline_inputs, varying_table

TABLE = varying_table(6, num_layers=3)
ARTIFACT = dict(num_layers=3)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def small():
    """Three layers: tracing is what takes the time."""
    return make_model(num_layers=3)


@torch.no_grad()
def run_levels(model, handle, levels, batch=2):
    return [handle.at(sigma) and model(**make_inputs(batch, sigma=sigma))[0] for sigma in levels]


@pytest.mark.parametrize("dynamic", [True, None])
def test_one_recompile_serves_all_noise_levels(dynamic, small):
    handle = shiva_ext.enable(small, make_artifact(TABLE, **ARTIFACT))
    wanted = run_levels(small, handle, TABLE.sigmas)
    counter = CompileCounter()
    compiled = torch.compile(small, fullgraph=True, dynamic=dynamic, backend=counter)
    for _ in range(2):
        for got, eager in zip(run_levels(compiled, handle, TABLE.sigmas), wanted, strict=True):
            assert torch.equal(got, eager)
    assert counter.frame_count <= 2


def test_static_shapes_make_one_graph_for_each_row_of_counts(small):
    counts = torch.tensor([[N, 8, 12], [N, 4, 12], [N, 8, 12]])
    handle = shiva_ext.enable(small, make_artifact(RatioTable([0.1, 0.5, 0.9], counts / N), **ARTIFACT))
    levels = [0.1, 0.12, 0.5, 0.9, 0.05, 0.45, 0.95]
    wanted = run_levels(small, handle, levels)
    counter = CompileCounter()
    compiled = torch.compile(small, fullgraph=True, dynamic=False, backend=counter)
    for got, eager in zip(run_levels(compiled, handle, levels), wanted, strict=True):
        assert torch.equal(got, eager)
    assert counter.frame_count == 2


def test_the_pipeline_runs_compiled_and_equals_eager(small):
    pipe = make_pipeline(small)
    handle = shiva_ext.enable(pipe, make_artifact(TABLE, **ARTIFACT))
    options = [dict(steps=6), dict(guidance=1.0), dict(prompts=2, size=12)]
    wanted = [pipe(**pipeline_inputs(**each))[0] for each in options]
    counter = CompileCounter()
    pipe.transformer = torch.compile(small, fullgraph=True, backend=counter)
    assert shiva_ext.get_handle(pipe) is handle
    graphs = []
    for each, eager in zip(options, wanted, strict=True):
        assert torch.equal(pipe(**pipeline_inputs(**each))[0], eager)
        graphs.append(counter.frame_count)
    assert graphs[0] <= 2 and graphs[-1] <= 5
    assert torch.equal(pipe(**pipeline_inputs(steps=6))[0], wanted[0]) and counter.frame_count == graphs[-1]


def test_a_model_compiled_before_enabling_follows_enable_and_disable(small):
    pipe, twin = make_pipeline(small), make_pipeline(make_model(num_layers=3))
    dense = pipe(**pipeline_inputs())[0]
    small.compile(fullgraph=True, backend="eager")
    assert torch.equal(pipe(**pipeline_inputs())[0], dense)
    with (
        shiva_ext.enable(pipe, make_artifact(TABLE, **ARTIFACT)),
        shiva_ext.enable(twin, make_artifact(TABLE, **ARTIFACT)),
    ):
        assert torch.equal(pipe(**pipeline_inputs())[0], twin(**pipeline_inputs())[0])
    assert torch.equal(pipe(**pipeline_inputs())[0], dense)


def test_a_compiled_call_without_a_noise_level_says_what_to_do(small):
    shiva_ext.enable(small, make_artifact(TABLE, **ARTIFACT))
    compiled = torch.compile(small, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="enable on the pipeline, or call handle.at"):
        compiled(**make_inputs())


def test_gradients_through_the_compiled_model_equal_eager(small):
    handle = shiva_ext.enable(small, make_artifact(TABLE, **ARTIFACT)).at(0.5)
    weight = small.transformer_blocks[1].ff.net[2].weight
    wanted = torch.autograd.grad(small(**make_inputs())[0].square().mean(), weight)[0]
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(**make_inputs())[0].square().mean(), weight)[0]
    assert handle.state.conditioning is None
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile's default backend needs a C++ compiler")
def test_the_default_backend_equals_eager_to_rounding():
    model = make_model(num_layers=2)
    handle = shiva_ext.enable(model, make_artifact(0.6, num_layers=2)).at(0.5)
    with torch.no_grad():
        got = torch.compile(model, fullgraph=True)(**make_inputs())[0]
        torch.testing.assert_close(got, model(**make_inputs())[0], rtol=1e-4, atol=1e-4)
    assert handle.num_hooked == 1
