"""SmoothCache and FORA on a tiny SD3: which modules run when, what they give, and beside a selection."""

import pytest
import torch
from models.tiny import LAYERS, N, make_artifact, make_model, make_pipeline, pipeline_inputs

import shiva_ext
from shiva_ext.caches import FORA, SmoothCache, TeaCache, make_schedule
from shiva_ext.methods import ToMeSD
from shiva_ext.selection import RandomSelector

from .test_teacache import drifting

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 6
ATTENTION, MLP = (1, 0, 1, 0, 0, 1), (1, 1, 0, 0, 1, 1)
BOTH = SmoothCache({"attention": ATTENTION, "mlp": MLP})


def run(*sources, steps: int = STEPS, model=None, prompts: int = 2, **options):
    pipe = make_pipeline(model or make_model())
    for source in sources:
        shiva_ext.enable(pipe, source)
    result = pipe(**pipeline_inputs(prompts, steps, **options))[0]
    shiva_ext.disable(pipe)
    return result


class Calls:
    """Counts the calls that really run a module's first linear layer."""

    def __init__(self, module):
        self.count = 0
        module.register_forward_pre_hook(self._count)

    def _count(self, *_):
        self.count += 1


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("cache", [FORA(1), SmoothCache({"attention": (1,) * STEPS, "mlp": (1,) * STEPS})], ids=repr)
def test_computing_always_is_the_model_bit_for_bit(cache, guidance):
    assert torch.equal(run(cache, guidance=guidance), run(guidance=guidance))


def test_alpha_zero_is_the_model_bit_for_bit():
    schedule = make_schedule({1: [0.1] * (STEPS - 1)}, 0.0, STEPS)
    assert torch.equal(run(SmoothCache({"attention": schedule, "mlp": schedule})), run())


def test_modules_run_as_often_as_the_schedules_say():
    model = make_model()
    block = model.transformer_blocks[1]
    counts = [Calls(block.attn.to_q), Calls(block.ff.net[0]), Calls(block.ff_context.net[0])]
    run(BOTH, model=model)
    assert [each.count for each in counts] == [sum(ATTENTION), sum(MLP), sum(MLP)]


@pytest.mark.parametrize(("interval", "count"), [(1, 6), (2, 4), (3, 3), (5, 2), (99, 2)])
def test_fora_runs_every_nth_step_and_the_last(interval, count):
    model = make_model()
    calls = Calls(model.transformer_blocks[2].attn.to_q)
    run(FORA(interval), model=model)
    assert calls.count == count


@torch.no_grad()
def by_hand(model, inputs: list[dict], schedules: dict) -> list:
    """Blocks written out, their attention's and MLPs' outputs taken from the last step that computed them."""
    kept, outputs = {}, []

    def module(kind, key, step, compute):
        if schedules[kind][step]:
            kept[key] = compute()
        return kept[key]

    for step, call in enumerate(inputs):
        x = model.pos_embed(call["hidden_states"])
        text = model.context_embedder(call["encoder_hidden_states"])
        temb = model.time_text_embed(call["timestep"], call["pooled_projections"])
        for i, block in enumerate(model.transformer_blocks):
            entry, gate, shift, scale, gate_mlp = block.norm1(x, emb=temb)
            if block.context_pre_only:
                context = block.norm1_context(text, temb)
            else:
                context, c_gate, c_shift, c_scale, c_gate_mlp = block.norm1_context(text, emb=temb)
            ours, theirs = module(
                "attention", (i, "attn"), step, lambda e=entry, c=context, b=block: b.attn(e, encoder_hidden_states=c)
            )
            x = x + gate.unsqueeze(1) * ours
            normed = block.norm2(x) * (1 + scale[:, None]) + shift[:, None]
            x = x + gate_mlp.unsqueeze(1) * module("mlp", (i, "ff"), step, lambda n=normed, b=block: b.ff(n))
            if not block.context_pre_only:
                text = text + c_gate.unsqueeze(1) * theirs
                normed = block.norm2_context(text) * (1 + c_scale[:, None]) + c_shift[:, None]
                update = module("mlp", (i, "ctx"), step, lambda n=normed, b=block: b.ff_context(n))
                text = text + c_gate_mlp.unsqueeze(1) * update
        p, (B, _, H, W) = 2, call["hidden_states"].shape
        patches = model.proj_out(model.norm_out(x, temb)).reshape(B, H // p, W // p, p, p, -1)
        outputs.append(patches.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, H, W))
    return outputs


@torch.no_grad()
def test_against_blocks_written_out():
    model, calls = make_model(), drifting(STEPS, pace=0.3, batch=2)
    wanted = by_hand(model, calls, dict(BOTH.schedules))
    with shiva_ext.enable(model, BOTH):
        found = [model(**call)[0] for call in calls]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


def kind(source) -> str:
    return type(source).__name__


@torch.no_grad()
@pytest.mark.parametrize("fused", [True, False])
def test_beside_a_selection_a_token_gets_its_own_last_output(fused):
    """By hand on one block: what a token's MLP gave when it was last chosen at a computed step, else nothing."""
    model, calls = make_model(), drifting(4, pace=0.3)
    schedule = (1, 1, 0, 0)
    cache = SmoothCache({"attention": (1,) * 4, "mlp": schedule})
    layer, ff = 2, make_model().transformer_blocks[2].ff
    given, seen = [], []
    with (
        shiva_ext.enable(model, RandomSelector(0.5), fused=fused) as handle,
        shiva_ext.enable(model, cache),
    ):
        block = model.transformer_blocks[layer]
        inner = block.ff.forward

        def spy(x):
            seen.append(x.clone())
            given.append(inner(x))
            return given[-1]

        block.ff.forward = spy
        handle.record()
        for call in calls:
            model(**call)
        kept = [record["kept"][layer] for record in handle.records]
        block.ff.forward = inner
    last = torch.zeros(1, N, 64)
    for step in range(4):
        rows = kept[step][0]
        if schedule[step]:
            last[0, rows] = ff(seen[step])[0]
        torch.testing.assert_close(given[step][0], last[0, rows], atol=1e-5, rtol=1e-5)
    assert not torch.equal(kept[1], kept[2])


@pytest.mark.parametrize(
    "source", [make_artifact(0.6), RandomSelector(0.5), ToMeSD(0.5)], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("cache", [FORA(2), BOTH, TeaCache(1.5, "identity")], ids=lambda c: type(c).__name__)
def test_order_does_not_matter_and_disabling_leaves_nothing(source, cache):
    results, model = [], make_model()
    dense = run(model=model)
    for order in ((source, cache), (cache, source)):
        pipe = make_pipeline(model)
        handles = [shiva_ext.enable(pipe, each, batched_guidance=True) for each in order]
        results.append(pipe(**pipeline_inputs(2, STEPS))[0])
        for handle in handles:  # the first one first, too
            handle.disable()
        assert not any(hasattr(m, "_diffusers_hook") for m in model.modules())
        assert torch.equal(run(model=model), dense)
    assert torch.equal(*results) and not torch.equal(results[0], dense)


def test_taking_one_away_leaves_the_other():
    source, cache, model = make_artifact(0.6), FORA(2), make_model()
    only = {name: run(each, model=model) for name, each in (("selection", source), ("cache", cache))}
    pipe = make_pipeline(model)
    selection, cached = shiva_ext.enable(pipe, source), shiva_ext.enable(pipe, cache)
    selection.disable()
    assert torch.equal(pipe(**pipeline_inputs(2, STEPS))[0], only["cache"])
    selection = shiva_ext.enable(pipe, source)
    cached.disable()
    assert torch.equal(pipe(**pipeline_inputs(2, STEPS))[0], only["selection"])
    selection.disable()


def test_enabling_again_replaces_a_cache_of_any_kind():
    model = make_model()
    pipe = make_pipeline(model)
    for cache in (TeaCache(0.4, "identity"), FORA(3), BOTH, FORA(2)):
        shiva_ext.enable(pipe, cache)
    assert torch.equal(pipe(**pipeline_inputs(2, STEPS))[0], run(FORA(2), model=make_model()))
    shiva_ext.disable(pipe)


def test_a_cache_that_does_not_fit_leaves_the_one_that_was_there():
    pipe = make_pipeline(make_model())
    shiva_ext.enable(pipe, FORA(2))
    with pytest.raises(ValueError, match="has a schedule for 'cross_attention'; SD3Transformer2DModel has 'attention'"):
        shiva_ext.enable(pipe, SmoothCache({"cross_attention": (1, 0, 1)}))
    assert torch.equal(pipe(**pipeline_inputs(2, STEPS))[0], run(FORA(2)))


def test_block_merging_and_module_caches_are_refused():
    model = make_model()
    with shiva_ext.enable(model, ToMeSD(0.5, sites=("block",))), pytest.raises(ValueError, match="use TeaCache"):
        shiva_ext.enable(model, FORA(2, steps=4))
    with shiva_ext.enable(model, FORA(2, steps=4)), pytest.raises(ValueError, match="use TeaCache"):
        shiva_ext.enable(model, ToMeSD(0.5, sites=("block",)))


def test_runs_of_other_lengths_are_refused_and_another_size_starts_anew():
    pipe = make_pipeline(make_model())
    shiva_ext.enable(pipe, BOTH)
    pipe(**pipeline_inputs(1, STEPS))
    with pytest.raises(ValueError, match="schedules of 6 steps, got a run of 5"):
        pipe(**pipeline_inputs(1, 5))
    for size, prompts in ((12, 1), (8, 3)):
        found = pipe(**pipeline_inputs(prompts, STEPS, size=size))[0]
        assert torch.equal(found, run(BOTH, prompts=prompts, size=size))


def test_memory_is_bounded_and_given_back():
    pipe = make_pipeline(make_model())
    handle = shiva_ext.enable(pipe, FORA(2))
    pipe(**pipeline_inputs(2, STEPS, guidance=4.0))
    assert 0 < handle.peak_bytes <= 4 * FORA(2).memory_bound(LAYERS, 4, N, 3, 64) and handle.bytes == 0


def test_summary_names_the_cache_alone_and_beside_a_selection():
    pipe = make_pipeline(make_model())
    with shiva_ext.enable(pipe, TeaCache(0.4, "identity")):
        pipe(**pipeline_inputs(1, STEPS))
        alone = shiva_ext.summary(pipe)
        assert "TeaCache(threshold=0.4" in str(alone) and "of 6 calls" in str(alone) and "MiB" in str(alone)
        assert alone.mean_ratio == 1 and alone.flop_speedup == 1
        with shiva_ext.enable(pipe, make_artifact(0.6)):
            both = shiva_ext.summary(pipe)
            assert "TeaCache" in both.cache and both.mean_ratio < 0.7
    with pytest.raises(RuntimeError, match="not enabled"):
        shiva_ext.summary(pipe)


@torch.no_grad()
def test_one_graph_a_pattern_to_a_compiler():
    torch._dynamo.reset()
    graphs = []

    def counting(module, inputs):
        graphs.append(module)
        return module.forward

    pipe = make_pipeline(make_model())
    with shiva_ext.enable(pipe, BOTH):
        eager = pipe(**pipeline_inputs(2, STEPS))[0]
        pipe.transformer = torch.compile(pipe.transformer, backend=counting, fullgraph=True)
        found = [pipe(**pipeline_inputs(2, STEPS))[0] for _ in range(2)]
        count = len(graphs)
        found.append(pipe(**pipeline_inputs(2, STEPS))[0])
    patterns = {(a, m) for a, m in zip(ATTENTION, MLP, strict=True)}
    assert len(graphs) == count == len(patterns)
    for each in found:
        torch.testing.assert_close(each, eager, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SmoothCache({}), "schedules is empty"),
        (lambda: SmoothCache({"mlp": (1, 0), "attention": (1, 0, 1)}), "wanted equally many"),
        (lambda: SmoothCache({"mlp": ()}), "at least 1"),
        (lambda: SmoothCache({"mlp": (0, 1)}), "the first 1"),
        (lambda: SmoothCache({"mlp": (1, 2)}), r"wanted 1 \(compute\) or 0"),
        (lambda: SmoothCache({"mlp": (1, 0)}, steps=3), "steps is 3, but the schedules have 2"),
        (lambda: FORA(0), "interval is 0"),
    ],
)
def test_wrong_settings_say_what_is_wanted(build, message):
    with pytest.raises(ValueError, match=message):
        build()
