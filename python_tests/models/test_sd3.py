"""Token selection on SD3Transformer2DModel and all its options, against the blocks run by hand on the kept tokens."""

import pytest
import torch
from peft import LoraConfig

import shiva_ext
from shiva_ext.selection import LargestNormSelector, RandomSelector, RatioTable

from .tiny import LAYERS, WIDTH, N, make_artifact, make_inputs, make_model, run_by_hand, varying_table

CONFIGS = {
    "sd3": dict(qk_norm=None),
    "sd3.5": dict(qk_norm="rms_norm"),
    "dual attention": dict(dual_attention_layers=(0, 1, 3)),
    "two heads": dict(num_attention_heads=2, attention_head_dim=WIDTH // 2),
    "one pruned layer": dict(num_layers=2),
    "other channels out": dict(out_channels=2),
}


@torch.no_grad()
def run(model, source, inputs, **options):
    """Output and kept tokens of one call."""
    with shiva_ext.enable(model, source, **options) as handle:
        handle.record()
        output = model(**inputs)[0]
    return output, handle.records[0]["kept"]


def assert_runs_as_by_hand(model, twin, inputs, source=None):
    source = make_artifact(varying_table(), model.config.num_layers) if source is None else source
    output, kept = run(model, source, inputs)
    wanted, _ = run_by_hand(twin, kept, inputs)
    torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        dense = twin(**inputs)[0]
    assert (output - dense).abs().max() > 0.1  # so that the test can fail
    return kept


@pytest.mark.parametrize("name", CONFIGS)
def test_each_block_runs_on_the_kept_tokens_alone(name):
    layers = CONFIGS[name].get("num_layers", LAYERS)
    source = make_artifact(varying_table(num_layers=layers), layers)
    model, twin = make_model(**CONFIGS[name]), make_model(**CONFIGS[name])
    kept = assert_runs_as_by_hand(model, twin, make_inputs(), source)
    assert {layer: index.shape[1] for layer, index in kept.items()} == {
        layer: k for layer, k in enumerate(source.table.tokens(0.7, N)) if layer
    }


def test_rejected_tokens_pass_a_block_unchanged(model, inputs, artifact):
    seen = {}

    def remember(layer):
        return lambda block, args, kwargs, output: seen.update({layer: (kwargs["hidden_states"], output[1])})

    for layer, block in enumerate(model.transformer_blocks):
        block.register_forward_hook(remember(layer), with_kwargs=True)
    _, kept = run(model, artifact, inputs)
    assert list(kept) == [1, 2, 3]
    for layer, index in kept.items():
        before, after = seen[layer]
        chosen = torch.zeros(before.shape[:2], dtype=torch.bool).scatter(1, index, True)
        assert torch.equal(after[~chosen], before[~chosen])
        assert (after[chosen] != before[chosen]).any(dim=-1).all()


def test_the_first_block_is_dense(model, inputs, artifact):
    outputs = []
    model.transformer_blocks[0].register_forward_hook(lambda block, args, output: outputs.append(output))
    with torch.no_grad():
        model(**inputs)
    _, kept = run(model, artifact, inputs)
    assert 0 not in kept
    for dense, pruned in zip(*outputs, strict=True):
        assert torch.equal(dense, pruned)


def test_the_router_sees_each_blocks_input_and_its_best_tokens_are_kept(model, inputs, artifact):
    _, kept = run(model, artifact, inputs)
    twin, router = make_model(), artifact.router
    _, tokens = run_by_hand(twin, kept, inputs)
    embed = twin.time_text_embed
    time = embed.timestep_embedder(embed.time_proj(inputs["timestep"]))
    pooled = embed.text_embedder(inputs["pooled_projections"])
    for layer, index in kept.items():
        scores = router(layer, tokens[layer], time, pooled)
        best = scores.argsort(dim=1, descending=True)[:, : int(0.6 * N)]
        assert torch.equal(index, best.sort(dim=1).values)


@pytest.mark.parametrize("residuals", [1, 2, LAYERS - 1])
def test_controlnet_residuals_reach_every_token(residuals):
    inputs = make_inputs()
    inputs["block_controlnet_hidden_states"] = [torch.randn(2, N, WIDTH) for _ in range(residuals)]
    assert_runs_as_by_hand(make_model(), make_model(), inputs)


@pytest.mark.parametrize("skipped", [[1], [0, 2], [3]])
def test_skipped_layers_select_nothing(skipped):
    kept = assert_runs_as_by_hand(make_model(), make_model(), make_inputs() | {"skip_layers": skipped})
    assert set(kept) == {1, 2, 3} - set(skipped)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_lora_loaded_before_or_after_enabling_counts(when, inputs):
    def load(model):
        torch.manual_seed(4)
        targets = ["to_q", "to_v", "ff.net.2"]
        model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "style")
        return model.eval()

    twin, model, source = load(make_model()), make_model(), make_artifact(varying_table())
    if when == "before":
        load(model)
    handle = shiva_ext.enable(model, source).record()
    if when == "after":
        load(model)
    with torch.no_grad():
        output = model(**inputs)[0]
        wanted, _ = run_by_hand(twin, handle.records[0]["kept"], inputs)
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-4)
        handle.disable()
        assert torch.equal(model(**inputs)[0], twin(**inputs)[0])
        model.delete_adapters("style")
        assert not torch.equal(model(**inputs)[0], twin(**inputs)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_ratio_1_gives_the_dense_bits(name, dtype):
    model, inputs = make_model(**CONFIGS[name]).to(dtype), make_inputs(dtype=dtype)
    with torch.no_grad():
        dense = model(**inputs)[0]
    artifact = make_artifact(num_layers=model.config.num_layers)
    assert dense.isfinite().all() and dense.dtype == dtype
    assert torch.equal(run(model, artifact, inputs, ratio=1.0)[0], dense)
    assert torch.equal(run(model, artifact, inputs, budget=1.0)[0], dense)
    assert torch.equal(run(model, RandomSelector(1.0), inputs)[0], dense)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models_run_as_by_hand(dtype):
    model, twin, inputs = make_model().to(dtype), make_model().to(dtype), make_inputs(dtype=dtype)
    output, kept = run(model, make_artifact(varying_table()), inputs, fused=False)
    wanted, _ = run_by_hand(twin, kept, inputs)
    assert output.dtype == dtype
    torch.testing.assert_close(output, wanted, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("selector", [RandomSelector, LargestNormSelector])
def test_baselines_keep_the_asked_share(selector, model, inputs):
    kept = assert_runs_as_by_hand(model, make_model(), inputs, selector(0.3))
    assert all(index.shape == (2, int(0.3 * N)) for index in kept.values())


def counts_with(model, source, inputs, tile):
    _, kept = run(model, source, inputs, tile=tile)
    return [kept[layer].shape[1] if layer in kept else N for layer in (1, 2, 3)]


def test_token_counts_are_multiples_of_the_tile_with_the_schedules_mean(model, inputs):
    table = RatioTable([0.5], torch.tensor([[1, 1 / N, 6 / N, 15 / N]]))
    # 22 tokens in all: 5 tiles of 4 are nearest (6 are as near, the lower total counts); 8 is the least of 3 x 8.
    for tile, counts in ((1, [1, 6, 15]), (4, [4, 4, 12]), (8, [8, 8, 8])):
        assert counts_with(model, make_artifact(table), inputs, tile) == counts
    # No multiple of these tiles is the whole sequence: each count is rounded by itself.
    for tile, counts in ((5, [5, 5, 15]), (64, [16, 16, 16])):
        assert counts_with(model, make_artifact(table), inputs, tile) == counts


class OwnRatios:
    def ratios(self, sigma):
        return (1, 1 / N, 6 / N, 15 / N)

    def scores(self, layer, x, sigma, conditioning):
        return x[..., 0]


def test_the_counts_of_a_selector_with_its_own_ratios_are_rounded(model, inputs):
    for tile, counts in ((1, [1, 6, 15]), (4, [4, 8, 16]), (8, [8, 8, 16]), (64, [16, 16, 16])):
        assert counts_with(model, OwnRatios(), inputs, tile) == counts


def test_positional_and_keyword_calls_agree(model, artifact):
    inputs = make_inputs()
    output, _ = run(model, artifact, inputs)
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    with torch.inference_mode(), shiva_ext.enable(model, artifact):
        assert torch.equal(model(*(inputs[name] for name in names)).sample, output)


def test_resolution_and_batch_may_change_from_call_to_call(model, artifact):
    with torch.no_grad(), shiva_ext.enable(model, artifact) as handle:
        for batch, size in ((1, 8), (3, 12), (2, 4), (1, 8)):
            handle.record()
            output = model(**make_inputs(batch, size))[0]
            kept = handle.records[0]["kept"]
            wanted, _ = run_by_hand(make_model(), kept, make_inputs(batch, size))
            torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-4)
            assert all(index.shape == (batch, int(0.6 * (size // 2) ** 2)) for index in kept.values())


def test_samples_at_different_noise_levels_are_an_error_that_says_so(model, artifact):
    inputs = make_inputs() | {"timestep": torch.tensor([700.0, 300.0])}
    shiva_ext.enable(model, artifact)
    with pytest.raises(ValueError, match="noise levels from 0.3000 to 0.7000.*once per level"):
        model(**inputs)


def test_one_timestep_may_serve_a_whole_batch(model, artifact, inputs):
    with torch.no_grad(), shiva_ext.enable(model, artifact):
        expected = model(**inputs)[0]
        actual = model(**inputs | {"timestep": inputs["timestep"][:1]})[0]
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("source", ["router", "norm"])
def test_a_float64_model_works_with_a_float32_router(model, artifact, inputs, source):
    model = model.double()
    inputs = {k: v.double() if torch.is_tensor(v) else v for k, v in inputs.items()}
    with torch.no_grad(), shiva_ext.enable(model, artifact if source == "router" else LargestNormSelector(0.6)):
        assert model(**inputs)[0].dtype == torch.float64
