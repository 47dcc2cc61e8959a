"""GuidanceCache: the prompted half is exact, the other lies as far from it as at the last step that had both."""

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from models import tiny
from models.every_family import EVERY
from models.test_families import PIPELINES
from torch._dynamo.testing import CompileCounter

import shiva_ext
from shiva_ext.caches import GuidanceCache
from shiva_ext.methods import SDTM, ToMeSD
from shiva_ext.models import adapter_for
from shiva_ext.selection import RandomSelector

from .test_families_cached import LEVELS, STEPS, Forwards, calls_of, left_on, run, run_whose_guidance_ends, sd3_pipe

pytestmark = pytest.mark.usefixtures("one_thread")
IN_BATCH = [name for name in EVERY if name not in ("flux", "qwenimage", "wan")]
BOTH = (True, True, False, False, True)  # of the five steps of `calls_of`, at the defaults


def enable(model, cache=None, **options):
    return shiva_ext.enable(model, cache or GuidanceCache(steps=STEPS), batched_guidance=True, **options)


@pytest.mark.parametrize(
    ("every", "first", "computed"),
    [
        (3, 2, [0, 1, 4, 7]),
        (2, 1, [0, 2, 4, 6, 8]),
        (2, 3, [0, 1, 2, 4, 6, 8]),
        (99, 1, [0]),
        (1, 1, list(range(10))),
        (3, 99, list(range(10))),
    ],
)
def test_which_steps_compute_both(every, first, computed):
    cache = GuidanceCache(every, first)
    assert [step for step in range(10) if not cache.begin_step(step, 10)] == computed
    assert cache.computed(10) == len(computed)


@pytest.mark.parametrize("name", IN_BATCH)
def test_every_family_against_its_halves_written_out(name):
    model = EVERY[name][0]()
    calls = calls_of(name, model, batch=4)
    dense = run(model, calls)
    block = Forwards(adapter_for(model).cache_sites(adapter_for(model).blocks(model)[0])["mlp"][0][0])
    with enable(model):
        found = run(model, calls)
    sizes = [len(each) for each in block.given]
    assert sizes == [4 if both else 2 for both in BOTH]
    prompted = slice(0, 2) if name == "dit" else slice(2, 4)  # DiT's pipeline has the classes before the empty one
    other = slice(2, 4) if name == "dit" else slice(0, 2)
    for step, (mine, wanted) in enumerate(zip(found, dense, strict=True)):
        assert mine.shape == wanted.shape and mine.dtype == wanted.dtype
        torch.testing.assert_close(mine[prompted], wanted[prompted], rtol=1e-4, atol=1e-5)
        last = max(i for i in range(step + 1) if BOTH[i])
        expected = wanted[prompted] - (dense[last][prompted] - dense[last][other])
        torch.testing.assert_close(mine[other], expected, rtol=1e-4, atol=1e-5)
        if BOTH[step]:
            assert torch.equal(mine, wanted)
    del block.module.forward
    assert not left_on(model)


def test_leaving_nothing_out_is_the_model_bit_for_bit():
    pipe = sd3_pipe()
    dense = pipe(**tiny.pipeline_inputs(2, 6))[0]
    for cache in (GuidanceCache(1), GuidanceCache(3, first=6)):
        with shiva_ext.enable(pipe, cache):
            assert torch.equal(pipe(**tiny.pipeline_inputs(2, 6))[0], dense)


def test_a_pipeline_runs_half_the_batch_and_gives_memory_back():
    pipe = sd3_pipe()
    dense = pipe(**tiny.pipeline_inputs(2, 7))[0]
    block = Forwards(pipe.transformer.transformer_blocks[1].ff)
    with shiva_ext.enable(pipe, GuidanceCache()) as handle:
        first = pipe(**tiny.pipeline_inputs(2, 7))[0]
        assert [len(each) for each in block.given] == [4, 4, 2, 2, 4, 2, 2]
        assert handle.state.last == (3, 4) and "3 of 7 calls computed everything" in str(shiva_ext.summary(pipe))
        assert torch.equal(first, pipe(**tiny.pipeline_inputs(2, 7))[0]) and first.isfinite().all()
        assert handle.bytes == 0 < handle.peak_bytes
        B, (C, H, W) = 4, (pipe.transformer.config.in_channels, 8, 8)
        assert handle.peak_bytes <= 4 * B // 2 * C * H * W
    assert not torch.equal(first, dense)


@pytest.mark.parametrize("name", ["dit", "sana"])
def test_the_families_own_pipelines_guide_with_it(name):
    torch.manual_seed(0)
    model = EVERY[name][0](**(dict(num_embeds_ada_norm=1000) if name == "dit" else {}))
    pipe, arguments = PIPELINES[name](model)
    pipe.set_progress_bar_config(disable=True)
    guided = True if name == "dit" else None

    def generate():
        return pipe(num_inference_steps=6, generator=torch.Generator().manual_seed(0), **arguments)[0]

    plain = generate()
    with shiva_ext.enable(pipe, GuidanceCache(1), batched_guidance=guided):
        assert torch.equal(generate(), plain)
    with shiva_ext.enable(pipe, GuidanceCache(2), batched_guidance=guided) as handle:
        first = generate()
        assert torch.equal(first, generate()) and first.isfinite().all() and handle.state.last[1] > 0
    assert torch.equal(generate(), plain)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("source", [tiny.make_artifact, lambda: RandomSelector(0.5), lambda: ToMeSD(0.5)])
def test_beside_a_selection_the_prompted_half_is_that_of_the_half_alone(source, batched):
    """Where the halves share their tokens, the prompted one alone keeps what it needs itself."""
    calls = calls_of("sd3", tiny.make_model(), batch=4)
    halves = [{k: v[2:] if torch.is_tensor(v) else v for k, v in call.items()} for call in calls]
    results = []
    for order in ((0, 1), (1, 0)):
        model = tiny.make_model()
        for i in order:
            if i:
                enable(model)
            else:
                shiva_ext.enable(model, source(), batched_guidance=batched)
        torch.manual_seed(0)
        results.append(run(model, calls))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    if isinstance(source(), RandomSelector):
        return  # draws other tokens for another batch
    model = tiny.make_model()
    shiva_ext.enable(model, source(), batched_guidance=False)
    alone = run(model, halves)
    for step in (2, 3):
        torch.testing.assert_close(results[0][step][2:], alone[step], rtol=1e-4, atol=1e-5)


def test_records_say_which_half_ran():
    model = tiny.make_model()
    with shiva_ext.enable(model, tiny.make_artifact(0.6), batched_guidance=True) as handle, enable(model):
        handle.record()
        run(model, calls_of("sd3", model, batch=4))
    for both, record in zip(BOTH, handle.records, strict=True):
        assert ("rows" in record) != both
        assert all(len(kept) == (4 if both else 2) for kept in record["kept"].values())
        assert both or record["rows"].tolist() == [2, 3]
    assert model is handle.transformer and handle.state.branch is None


def test_what_carries_tensors_for_the_whole_batch_is_refused_and_leaves_what_was_there():
    pipe = sd3_pipe()
    before = tiny.snapshot(pipe.transformer)
    with shiva_ext.enable(pipe, SDTM()), pytest.raises(ValueError, match="SDTM carries tensors.*SmoothCache or FORA"):
        shiva_ext.enable(pipe, GuidanceCache())
    tiny.assert_unchanged(pipe.transformer, before)


@pytest.mark.parametrize("name", ["flux", "qwenimage", "wan"])
def test_families_that_guide_in_two_calls_are_refused(name):
    model = EVERY[name][0]()
    with pytest.raises(TypeError, match="guide in two calls or not at all; use another cache"):
        shiva_ext.enable(model, GuidanceCache(steps=3))
    assert not left_on(model)


def test_a_run_without_guidance_is_refused():
    pipe = sd3_pipe()
    with shiva_ext.enable(pipe, GuidanceCache()):
        with pytest.raises(ValueError, match="no guidance; give the pipeline a guidance_scale, or batched_guidance"):
            pipe(**tiny.pipeline_inputs(2, 4, guidance=1.0))
        assert pipe(**tiny.pipeline_inputs(2, 4))[0].isfinite().all()
    model = tiny.make_model()
    with enable(model), pytest.raises(ValueError, match="batch"):
        model(**calls_of("sd3", model, batch=3)[0])


@pytest.mark.parametrize(("settings", "message"), [(dict(every=0), "every is 0"), (dict(first=0), "first 0")])
def test_wrong_settings_say_what_is_wanted(settings, message):
    with pytest.raises(ValueError, match=message):
        GuidanceCache(**settings)
    with pytest.raises(ValueError, match=r"GuidanceCache\(..., steps=N\)"):
        shiva_ext.enable(tiny.make_model(), GuidanceCache())


def test_guidance_that_ends_within_a_run_leaves_whole_calls():
    pipe = sd3_pipe()
    dense = run_whose_guidance_ends(pipe)
    with shiva_ext.enable(pipe, GuidanceCache(9, first=3)):
        assert torch.equal(run_whose_guidance_ends(pipe), dense)  # all guided steps compute
    with shiva_ext.enable(pipe, GuidanceCache(9)):
        found = run_whose_guidance_ends(pipe)
    assert found.isfinite().all() and not torch.equal(found, dense)


def test_another_size_batch_number_of_steps_and_a_run_that_broke_off():
    pipe = sd3_pipe()
    shiva_ext.enable(pipe, GuidanceCache(2))

    def stop(pipe, step, timestep, tensors):
        if step == 2:
            raise KeyboardInterrupt
        return tensors

    for options in (dict(prompts=2), dict(prompts=1), dict(size=12), dict(steps=7), dict(steps=1)):
        with pytest.raises(KeyboardInterrupt):
            pipe(**tiny.pipeline_inputs(2, 5), callback_on_step_end=stop)
        found = pipe(**tiny.pipeline_inputs(**{"steps": 5, **options}))[0]
        fresh = sd3_pipe()
        shiva_ext.enable(fresh, GuidanceCache(2))
        assert torch.equal(found, fresh(**tiny.pipeline_inputs(**{"steps": 5, **options}))[0]), options


def test_skip_layer_guidance_adds_calls_that_are_no_halves():
    options = dict(skip_guidance_layers=[1], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=0.9)
    pipe = sd3_pipe()
    dense = pipe(**tiny.pipeline_inputs(1, 5), **options)[0]
    with shiva_ext.enable(pipe, GuidanceCache(1)):
        assert torch.equal(pipe(**tiny.pipeline_inputs(1, 5), **options)[0], dense)
    block = Forwards(pipe.transformer.transformer_blocks[0].ff)
    with shiva_ext.enable(pipe, GuidanceCache(3)):
        pipe(**tiny.pipeline_inputs(1, 5), **options)
    pairs = [2, 2, 1, 1, 2]
    assert sum(map(len, block.given)) == sum(pairs) + len(block.given) - len(pairs) and len(block.given) > len(pairs)


def test_an_image_to_start_from_computes_both_first():
    pipe = tiny.make_img2img(tiny.make_model())
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    block = Forwards(pipe.transformer.transformer_blocks[1].ff)
    inputs = tiny.pipeline_inputs(1, 8)
    inputs.pop("height"), inputs.pop("width")
    with shiva_ext.enable(pipe, GuidanceCache(3)):  # computes at 0, 1, 4 and 7; the run begins at 3
        pipe(image=image, strength=0.625, **inputs)
    assert [len(each) for each in block.given] == [2, 2, 1, 1, 2]


def test_two_calls_of_a_solvers_step_have_a_difference_each():
    pipe = sd3_pipe(scheduler=FlowMatchHeunDiscreteScheduler())
    dense = pipe(**tiny.pipeline_inputs(2, 4))[0]
    with shiva_ext.enable(pipe, GuidanceCache(1)):
        assert torch.equal(pipe(**tiny.pipeline_inputs(2, 4))[0], dense)
    with shiva_ext.enable(pipe, GuidanceCache(2)):
        first = pipe(**tiny.pipeline_inputs(2, 4))[0]
        assert first.isfinite().all() and torch.equal(first, pipe(**tiny.pipeline_inputs(2, 4))[0])


@torch.no_grad()
def test_a_named_output_comes_back_as_one():
    model = tiny.make_model()
    with enable(model):
        for call, both in zip(calls_of("sd3", model, batch=4), BOTH, strict=True):
            named = model(**call | dict(return_dict=True))
            assert len(named.sample) == 4 and type(named).__name__ == "Transformer2DModelOutput", both
    assert len(LEVELS) == len(BOTH)


@torch.no_grad()
def test_one_graph_a_pattern():
    torch._dynamo.reset()
    pipe = sd3_pipe(tiny.make_model(num_layers=1))
    shiva_ext.enable(pipe, GuidanceCache(2))
    eager, counter = pipe(**tiny.pipeline_inputs(2, 5))[0], CompileCounter()
    pipe.transformer = torch.compile(pipe.transformer, backend=counter, fullgraph=True, dynamic=False)
    found = [pipe(**tiny.pipeline_inputs(2, 5))[0]]
    graphs = counter.frame_count
    found.append(pipe(**tiny.pipeline_inputs(2, 5))[0])
    assert graphs == counter.frame_count == 2
    for each in found:
        torch.testing.assert_close(each, eager, rtol=1e-4, atol=1e-5)
