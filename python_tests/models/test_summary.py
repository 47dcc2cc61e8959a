"""summary() against what a run really keeps, and against the FLOPs counted from the settings."""

import pytest
import torch

import shiva_ext
from shiva_ext.evaluation.flops import sd3_forward_flops
from shiva_ext.selection import LargestNormSelector, RatioTable

from .tiny import LAYERS, TEXT, N, make_artifact, make_inputs, make_model, pipeline_inputs, varying_table


def test_the_counts_are_those_of_a_run(pipe):
    handle = shiva_ext.enable(pipe, make_artifact(varying_table())).record()
    pipe(**pipeline_inputs(steps=5))
    sigmas = [t / 1000 for t in pipe.scheduler.timesteps.tolist()]
    summary = shiva_ext.summary(pipe, steps=sigmas)
    assert summary.sigmas == tuple(sigmas) and summary.num_tokens == N and summary.hooked == LAYERS - 1
    for row, record in zip(summary.kept, handle.records, strict=True):
        assert list(row) == [record["kept"][k].shape[1] if k in record["kept"] else N for k in range(LAYERS)]


def test_the_mean_ratio_counts_the_pruned_layers_alone(model):
    table = varying_table()
    shiva_ext.enable(model, make_artifact(table))
    summary = shiva_ext.summary(model, steps=table.sigmas)
    cells = [k for sigma in table.sigmas for k in table.tokens(sigma, N)[1:]]
    assert summary.mean_ratio == pytest.approx(sum(cells) / len(cells) / N)
    assert summary.mean_ratio == pytest.approx(table.mean())


@pytest.mark.parametrize("num_tokens", [7, 100, 4096])
def test_a_ratio_of_k_tokens_keeps_k_and_never_none(model, num_tokens):
    counts = torch.randint(1, num_tokens + 1, (50, LAYERS), generator=torch.Generator().manual_seed(0))
    counts[:, 0] = num_tokens
    table = RatioTable([row / 50 for row in range(50)], counts / num_tokens)
    shiva_ext.enable(model, make_artifact(table), tile=1)
    summary = shiva_ext.summary(model, num_tokens=num_tokens, steps=table.sigmas)
    assert summary.kept == tuple(map(tuple, counts.tolist()))
    shiva_ext.enable(model, make_artifact(), ratio=1e-3, tile=1)
    assert shiva_ext.summary(model, num_tokens=num_tokens, steps=1).kept[0][1] == max(1, num_tokens // 1000)


def test_the_flops_are_those_of_the_settings(model):
    table, source = varying_table(), make_artifact(varying_table())
    shiva_ext.enable(model, source)
    summary = shiva_ext.summary(model, steps=[0.1, 0.9], text_tokens=TEXT)
    assert summary.dense_flops == sd3_forward_flops(model, TEXT, N)
    for sigma, flops in zip((0.1, 0.9), summary.flops, strict=True):
        kept = {layer: k for layer, k in enumerate(table.tokens(sigma, N)) if k < N}
        assert flops == sd3_forward_flops(model, TEXT, N, kept, source.router.config.hidden)
    assert summary.flop_speedup == pytest.approx(summary.dense_flops * 2 / sum(summary.flops))


def test_a_dense_schedule_costs_exactly_the_dense_model(model, artifact):
    shiva_ext.enable(model, artifact, ratio=1.0)
    summary = shiva_ext.summary(model)
    assert summary.mean_ratio == summary.flop_speedup == 1.0
    assert len(summary.sigmas) == 8 and summary.sigmas[0] == 1.0 and summary.sigmas[-1] > 0


def test_a_baseline_has_no_router_to_pay_for(model):
    shiva_ext.enable(model, LargestNormSelector(0.5))
    summary = shiva_ext.summary(model, num_tokens=64, steps=1, text_tokens=TEXT)
    assert summary.kept == ((64, 32, 32, 32),)
    assert summary.flops == (sd3_forward_flops(model, TEXT, 64, {1: 32, 2: 32, 3: 32}),)


def test_it_prints_a_row_for_each_step(model):
    shiva_ext.enable(model, make_artifact(varying_table()), tile=4)
    text = str(shiva_ext.summary(model, steps=[0.9, 0.1]))
    assert text.splitlines()[0].startswith("shiva_ext: 3 of 4 blocks hooked, 16 image tokens, mean ratio 0.")
    assert text.splitlines()[1] == "3 pruned blocks run fused"
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["sigma", "0.900", "0.100"]
    assert all(int(k) % 4 == 0 for line in text.splitlines()[3:] for k in line.split()[1:])


def test_it_leaves_a_fixed_noise_level_alone(model):
    handle = shiva_ext.enable(model, make_artifact(varying_table())).at(0.3)
    before = (handle.state.sigma, handle.state.quota, handle.state.fixed)
    shiva_ext.summary(model)
    assert (handle.state.sigma, handle.state.quota, handle.state.fixed) == before


def test_what_it_needs_is_said_clearly(artifact):
    model = make_model()
    with pytest.raises(RuntimeError, match="call shiva_ext.enable"):
        shiva_ext.summary(model)
    shiva_ext.enable(model, artifact)
    for steps in (0, []):
        with pytest.raises(ValueError, match="wanted at least one noise level"):
            shiva_ext.summary(model, steps=steps)
    with pytest.raises(ValueError, match="noise level in \\[0, 1\\]"):
        shiva_ext.summary(model, steps=[torch.tensor(500.0).item()])


@pytest.mark.parametrize("fused", [True, False])
def test_a_measured_run_tells_the_share_of_each_op(model, artifact, fused):
    shiva_ext.enable(model, artifact, ratio=0.5, fused=fused)
    assert shiva_ext.summary(model).op_shares is None
    calls = []

    @torch.no_grad()
    def run():
        calls.append(model(**make_inputs()))

    summary = shiva_ext.summary(model, run=run)
    assert len(calls) == 1
    moves = {"gather_modulate", "scatter_residual"} if fused else {"token_gather", "token_scatter"}
    assert set(summary.op_shares) == {"router_score", "topk_select"} | moves
    shares = list(summary.op_shares.values())
    assert shares == sorted(shares, reverse=True) and 0 < min(shares) and sum(shares) < 1
    assert str(summary).splitlines()[-1].startswith(f"share of time: {sum(shares):.2%} in the package's ops (")
    shiva_ext.enable(model, artifact, ratio=1.0)
    assert shiva_ext.summary(model, run=run).op_shares == {}


def test_a_level_out_of_range_leaves_the_fixed_one_alone(model):
    handle = shiva_ext.enable(model, make_artifact(varying_table())).at(0.3)
    before = (handle.state.sigma, handle.state.quota, handle.state.fixed)
    with pytest.raises(ValueError, match="noise level in"):
        shiva_ext.summary(model, steps=[0.2, 2.0])
    assert (handle.state.sigma, handle.state.quota, handle.state.fixed) == before
