"""TeaCache: its rule, that images do not see each other, and what it refuses."""

import pytest
import torch
from models.tiny import LAYERS, N, make_artifact, make_inputs, make_model, make_pipeline, pipeline_inputs
from torch import nn

import shiva_ext
from shiva_ext.caches import COEFFICIENTS, TeaCache
from shiva_ext.methods import SDTM

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 6


def by_hand(coefficients, x: float) -> float:
    return sum(c * x**power for power, c in enumerate(reversed(coefficients)))


@pytest.mark.parametrize(("x", "value"), [(0, 0.26423), (0.05, 0.18050), (0.1, 0.20685), (0.2, 0.262), (0.3, 0.52213)])
def test_the_published_polynomial_of_flux(x, value):
    assert TeaCache(0.25, "flux").expected(COEFFICIENTS["flux"], x) == pytest.approx(value, abs=1e-5)


def test_bounds_move_changes_to_the_nearest():
    cache = TeaCache(0.25, (2.0, 1.0), bounds=(0.1, 0.3))
    assert [cache.expected((2.0, 1.0), x) for x in (0.0, 0.2, 9.0)] == pytest.approx([1.2, 1.4, 1.6])


def run(cache=None, prompts: int = 1, steps: int = STEPS, model=None, **options):
    pipe = make_pipeline(model or make_model())
    if cache is None:
        return pipe(**pipeline_inputs(prompts, steps, **options))[0], None
    with shiva_ext.enable(pipe, cache) as handle:
        return pipe(**pipeline_inputs(prompts, steps, **options))[0], handle


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_threshold_zero_is_the_uncached_model_bit_for_bit(guidance):
    dense, _ = run(prompts=2, guidance=guidance)
    cached, handle = run(TeaCache(0.0, "flux"), prompts=2, guidance=guidance)
    assert torch.equal(dense, cached) and handle.state.last == (2 * STEPS, 0)


def ran(model, index: int = 1) -> list[int]:
    """Fills with the batch that a block's MLP really sees."""
    seen = []
    model.transformer_blocks[index].ff.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen


@pytest.mark.parametrize(("first", "last", "steps"), [(1, 1, 6), (2, 1, 6), (1, 0, 6), (1, 3, 6), (1, 1, 1), (1, 1, 2)])
def test_first_and_last_steps_are_always_computed(first, last, steps):
    model = make_model()
    seen = ran(model)
    _, handle = run(TeaCache(1e9, "identity", first=first, last=last), steps=steps, model=model)
    computed = len({step for step in range(steps) if step < first or step >= steps - last})
    assert len(seen) == computed and handle.state.last == (computed, steps - computed)


def reference_run(model, inputs: list[dict], threshold: float, coefficients) -> tuple[list, list[bool]]:
    """The rule written out, on one call a step, with blocks run by hand."""
    outputs, decisions, total, before, added = [], [], 0.0, None, None
    for i, call in enumerate(inputs):
        x = model.pos_embed(call["hidden_states"])
        text = model.context_embedder(call["encoder_hidden_states"])
        temb = model.time_text_embed(call["timestep"], call["pooled_projections"])
        m = model.transformer_blocks[0].norm1(x, emb=temb)[0]
        if i in (0, len(inputs) - 1):
            compute = True
        else:
            total += by_hand(coefficients, ((m - before).abs().mean() / before.abs().mean()).item())
            compute = not total < threshold
        before = m
        decisions.append(compute)
        if compute:
            total, tokens = 0.0, x
            for block in model.transformer_blocks:
                text, tokens = block(tokens, text, temb)
            added = tokens - x
        tokens = x + added
        p, (B, _, H, W) = 2, call["hidden_states"].shape
        patches = model.proj_out(model.norm_out(tokens, temb)).reshape(B, H // p, W // p, p, p, -1)
        outputs.append(patches.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, H, W))
    return outputs, decisions


def drifting(steps: int, seed: int = 0, pace: float = 0.15, batch: int = 1) -> list[dict]:
    """Calls of a run whose latents move a little from step to step, in each sample by another pace."""
    generator = torch.Generator().manual_seed(seed)
    base = make_inputs(batch, seed=seed + 1)
    moves = torch.randn((steps, *base["hidden_states"].shape), generator=generator)
    paces = pace * (1 + torch.arange(batch) % 3 * 3).view(-1, 1, 1, 1)
    levels = torch.linspace(0.95, 0.1, steps)
    return [
        {**base, "hidden_states": base["hidden_states"] + paces * moves[i], "timestep": levels[i].expand(batch) * 1000}
        for i in range(steps)
    ]


@torch.no_grad()
@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.35, 0.5, 1.0, 1e9])
@pytest.mark.parametrize("coefficients", [(1.0, 0.0), (0.5, -0.2, 0.1)])
def test_the_rule_against_one_written_out(threshold, coefficients):
    model, calls = make_model(), drifting(8)
    wanted, decisions = reference_run(model, calls, threshold, coefficients)
    seen = ran(model)
    with shiva_ext.enable(model, TeaCache(threshold, coefficients, steps=8)):
        found, computed = [], []
        for call in calls:
            before = len(seen)
            found.append(model(**call)[0])
            computed.append(len(seen) > before)
    assert computed == decisions
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_an_image_does_not_see_the_others_of_its_batch(static):
    model, calls = make_model(), drifting(8, batch=4)
    cache = TeaCache(0.45, "identity", steps=8, static=static)
    seen = ran(model)
    with shiva_ext.enable(model, cache):
        together = [model(**call)[0] for call in calls]
        sizes = list(seen)
        alone = []
        for i in range(4):
            mine = [{k: v[i : i + 1] if torch.is_tensor(v) else v for k, v in call.items()} for call in calls]
            alone.append([model(**call)[0] for call in mine])
    assert len(set(sizes)) > 1 or static, "all images decided alike: the test shows nothing"
    assert not static or set(sizes) == {4}
    for step, output in enumerate(together):
        for i in range(4):
            torch.testing.assert_close(output[i : i + 1], alone[i][step], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_static_and_narrowed_shapes_give_the_same_images():
    model, calls = make_model(), drifting(8, batch=3)
    found = []
    for static in (False, True):
        with shiva_ext.enable(model, TeaCache(0.45, "identity", steps=8, static=static)):
            found.append([model(**call)[0] for call in calls])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


class AddsAConstant(nn.Module):
    context_pre_only = False

    def __init__(self, like):
        super().__init__()
        self.norm1 = like.norm1

    def forward(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs=None):
        return encoder_hidden_states, hidden_states + 0.25


@torch.no_grad()
def test_blocks_that_add_a_constant_are_exact_at_any_threshold():
    model, calls = make_model(), drifting(6)
    model.transformer_blocks = nn.ModuleList(AddsAConstant(block) for block in model.transformer_blocks)
    dense = [model(**call)[0] for call in calls]
    with shiva_ext.enable(model, TeaCache(1e9, "identity", steps=6)) as handle:
        cached = [model(**call)[0] for call in calls]
    assert handle.state.reused + (handle.state.last or (0, 0))[1] == 4
    for a, b in zip(cached, dense, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_both_halves_of_guidance_decide_together():
    model = make_model()
    seen = ran(model)
    run(TeaCache(0.5, "identity"), prompts=3, model=model, steps=10)
    assert all(size % 2 == 0 for size in seen)


@torch.no_grad()
def test_two_calls_of_guidance_have_a_memory_each():
    model, cond, uncond = make_model(), drifting(6, seed=0), drifting(6, seed=7)
    cache = TeaCache(0.4, "identity", steps=6)
    with shiva_ext.enable(model, cache):
        alone = [[model(**call)[0] for call in calls] for calls in (cond, uncond)]
    with shiva_ext.enable(model, cache):
        pairs = [(model(**a)[0], model(**b)[0]) for a, b in zip(cond, uncond, strict=True)]
    for step, pair in enumerate(pairs):
        for branch in (0, 1):
            assert torch.equal(pair[branch], alone[branch][step])


@torch.no_grad()
def test_a_second_run_starts_from_nothing():
    model, calls = make_model(), drifting(6)
    with shiva_ext.enable(model, TeaCache(1e9, "identity", steps=6)):
        first = [model(**call)[0] for call in calls]
        second = [model(**call)[0] for call in calls]
        broken = [model(**call)[0] for call in calls[:3]]  # a run that is not finished
        third = [model(**call)[0] for call in calls]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True)) and torch.equal(broken[0], first[0])


@torch.no_grad()
def test_another_size_in_a_run_computes():
    model, calls = make_model(), drifting(6)
    larger = [make_inputs(1, size=12) | {"timestep": call["timestep"]} for call in calls]
    dense = [model(**call)[0] for call in larger]
    with shiva_ext.enable(model, TeaCache(1e9, "identity", steps=6)):
        for call in calls[:2]:
            model(**call)
        assert torch.equal(model(**larger[2])[0], dense[2])
        assert not torch.equal(model(**larger[3])[0], dense[3])  # of its own size it reuses


@torch.no_grad()
def test_skip_layer_guidance_is_computed_and_disturbs_nothing():
    model, calls = make_model(), drifting(6)
    with shiva_ext.enable(model, TeaCache(1e9, "identity", steps=6)):
        plain = [model(**call)[0] for call in calls]
        for i, call in enumerate(calls):
            skipping = model(**call, skip_layers=[1, 2])[0]
            assert torch.equal(skipping, make_model()(**call, skip_layers=[1, 2])[0])
            assert torch.equal(model(**call)[0], plain[i])


@torch.no_grad()
def test_controlnet_residuals_are_not_added_twice():
    model = make_model()
    calls = drifting(4)
    residuals = [0.1 * torch.randn(1, N, 64, generator=torch.Generator().manual_seed(3)) for _ in range(LAYERS)]
    same = {**calls[0], "block_controlnet_hidden_states": residuals}
    wanted = model(**same)[0]
    with shiva_ext.enable(model, TeaCache(1e9, "identity", steps=4)):
        for call in calls:  # the same latents and residuals, at falling levels
            found = model(**{**same, "timestep": call["timestep"]})[0]
            if call is calls[0]:
                assert torch.equal(found, wanted)
    assert torch.isfinite(found).all()


@torch.no_grad()
def test_nan_is_computed_and_does_not_stay():
    model, calls = make_model(), drifting(6)
    calls[2] = {**calls[2], "hidden_states": calls[2]["hidden_states"] * float("nan")}
    seen = ran(model)
    with shiva_ext.enable(model, TeaCache(1e9, "identity", steps=6)):
        outputs = [model(**call)[0] for call in calls]
    assert torch.isnan(outputs[2]).all() and torch.isfinite(outputs[5]).all()
    assert len(seen) >= 4  # the first, the one with NaN, the one after it, the last


def test_memory_is_bounded_and_given_back():
    cache = TeaCache(0.3, "identity")
    _, handle = run(cache, prompts=2, guidance=4.0)
    assert 0 < handle.peak_bytes <= 4 * cache.memory_bound(LAYERS, 4, N, 3, 64)
    assert handle.bytes == 0


def test_disabling_restores_the_model():
    model = make_model()
    dense = model(**make_inputs())[0]
    run(TeaCache(0.3, "identity"), model=model)
    assert torch.equal(dense, model(**make_inputs())[0])
    assert not any(hasattr(m, "_diffusers_hook") for m in model.modules())
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(threshold=-1), "threshold is -1"),
        (dict(threshold=float("nan")), "threshold is nan"),
        (dict(threshold=0.1, coefficients="sd3"), "no published coefficients called 'sd3'"),
        (dict(threshold=0.1, coefficients=()), "wanted finite numbers"),
        (dict(threshold=0.1, coefficients=(1.0, float("inf"))), "wanted finite numbers"),
        (dict(threshold=0.1, bounds=(0.3, 0.1)), "bounds are"),
        (dict(threshold=0.1, first=0), "first is 0"),
        (dict(threshold=0.1, last=-1), "last -1"),
    ],
)
def test_wrong_settings_say_what_is_wanted(settings, message):
    with pytest.raises(ValueError, match=message):
        TeaCache(**settings)


def test_what_cannot_work_is_refused_and_leaves_nothing():
    model = make_model()
    with pytest.raises(ValueError, match="no coefficients were published for SD3Transformer2DModel"):
        shiva_ext.enable(make_pipeline(model), TeaCache(0.1))
    with pytest.raises(ValueError, match=r"TeaCache\(..., steps=N\)"):
        shiva_ext.enable(model, TeaCache(0.1, "identity"))
    with pytest.raises(ValueError, match="selects no tokens"):
        shiva_ext.enable(model, TeaCache(0.1, "identity", steps=3), budget=0.5)
    shiva_ext.enable(model, SDTM())
    with pytest.raises(ValueError, match="SDTM carries tensors"):
        shiva_ext.enable(model, TeaCache(0.1, "identity", steps=3))
    shiva_ext.disable(model)
    with shiva_ext.enable(model, TeaCache(0.1, "identity", steps=3)), pytest.raises(ValueError, match="SDTM carries"):
        shiva_ext.enable(model, SDTM())
    with (
        pytest.raises(ValueError, match=r"reconstruct='last'"),
        shiva_ext.enable(model, make_artifact(), reconstruct="last"),
    ):
        shiva_ext.enable(model, TeaCache(0.1, "identity", steps=3))
    assert not any(hasattr(m, "_diffusers_hook") for m in model.modules())


@torch.no_grad()
def test_more_steps_than_said_are_refused():
    model, calls = make_model(), drifting(6)
    with shiva_ext.enable(model, TeaCache(0.1, "identity", steps=3)) as handle:
        for call in calls[:3]:
            model(**call)
        with pytest.raises(RuntimeError, match="runs of 3 steps, got one more"):
            model(**calls[3])
        handle.reset()
        model(**calls[3])


def test_a_compiled_transformer_is_refused():
    pipe = make_pipeline(make_model())
    with shiva_ext.enable(pipe, TeaCache(0.1, "identity")), pytest.raises(Exception, match="FORA"):
        pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
        pipe(**pipeline_inputs(1, 2))
