"""diffusers' own caches through ``enable``: as diffusers has them where it can, and sound where it cannot."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    MagCacheConfig,
    PixArtSigmaPipeline,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from models import tiny
from models.every_family import EVERY
from models.families import build_wan

import shiva_ext
from shiva_ext.caches import FORA, DiffusersCache, TeaCache
from shiva_ext.caches.from_diffusers import CONFIGS
from shiva_ext.caches.state import CacheState
from shiva_ext.methods import SDTM, ToMeSD
from shiva_ext.selection import RandomSelector

from .test_families_cached import (
    STEPS,
    Forwards,
    calls_of,
    dit_run,
    fail,
    fbc,
    flux_inputs,
    flux_pipe,
    left_on,
    run,
    sd3_pipe,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def taylor(**options):
    options = dict(cache_interval=2, disable_cache_before_step=1, taylor_factors_dtype=torch.float32) | options
    return TaylorSeerCacheConfig(**options)


def mag():
    return MagCacheConfig(
        threshold=9.0, max_skip_steps=1, retention_ratio=0.1, num_inference_steps=6, mag_ratios=[1.0] * 6
    )


def pab(**options):
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(0, 990), **options
    )


def faster(**options):
    return FasterCacheConfig(
        spatial_attention_timestep_skip_range=(-1, 990), unconditional_batch_timestep_skip_range=(-1, 990),
        unconditional_batch_skip_range=2, attention_weight_callback=lambda _: 0.5, **options,
    )  # fmt: skip


def distilled():
    return faster(is_guidance_distilled=True)


def sea(**options):
    return SeaCacheConfig(threshold=9.0, **options)


FOR_FLUX = [fbc, taylor, mag, pab, distilled]


def sd3_run(source, model=None, **options):
    pipe = sd3_pipe(model)
    handle = None if source is None else shiva_ext.enable(pipe, source)
    return pipe(**tiny.pipeline_inputs(**{"prompts": 2, "steps": 6, **options}))[0], handle


# --------------------------------------------------------------------------------------------- what diffusers has, too


@pytest.mark.parametrize("config", FOR_FLUX)
def test_as_diffusers_has_it_on_flux(config):
    ours, theirs = flux_pipe(), flux_pipe()
    if config is taylor:  # its own patterns miss the MLPs
        mine = taylor(cache_identifiers=[r"transformer_blocks\.\d+\.attn", r"single_transformer_blocks\.\d+\.attn"])
        given = mine
    else:
        mine, given = config(), config()
    if hasattr(given, "current_timestep_callback"):
        given.current_timestep_callback = lambda: theirs._current_timestep.item()
    theirs.transformer.enable_cache(given)
    handle = shiva_ext.enable(ours, mine)
    dense = flux_pipe()(**flux_inputs(False))[0]
    wanted = theirs(**flux_inputs(False))[0]
    for _ in range(2):
        assert torch.equal(ours(**flux_inputs(False))[0], wanted)
        assert handle.bytes == 0 < handle.peak_bytes
    assert not torch.equal(wanted, dense)
    handle.disable()
    assert torch.equal(ours(**flux_inputs(False))[0], dense) and not left_on_blocks(ours.transformer)


def left_on_blocks(model) -> list[str]:
    """What hooks are left; flux's own cache context leaves an empty registry on the model itself."""
    return [name for name in left_on(model) if name]


@pytest.mark.parametrize("config", [fbc, taylor, mag, pab, faster])
def test_a_second_run_equals_the_first_and_removing_restores_the_model(config):
    model = tiny.make_model()
    before = tiny.snapshot(model)
    dense = sd3_run(None)[0]
    pipe = sd3_pipe(model)
    handle = shiva_ext.enable(pipe, config())
    found = [pipe(**tiny.pipeline_inputs(2, 6))[0] for _ in range(2)]
    assert torch.equal(*found) and not torch.equal(found[0], dense) and found[0].isfinite().all()
    assert handle.bytes == 0 < handle.peak_bytes <= 4 * handle.cache.memory_bound(4, 4, tiny.N, 3, 64)
    assert "MiB" in str(shiva_ext.summary(pipe))
    shiva_ext.disable(pipe)
    tiny.assert_unchanged(model, before)
    assert torch.equal(pipe(**tiny.pipeline_inputs(2, 6))[0], dense)


def pixart_run(model, source):
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, layers_per_block=1).eval()
    pipe = PixArtSigmaPipeline(None, None, vae, model, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    handle = None if source is None else shiva_ext.enable(pipe, source, batched_guidance=True)
    prompts = torch.randn(2, 1, 5, 24, generator=torch.Generator().manual_seed(0))
    found = pipe(
        prompt=None, negative_prompt=None, prompt_embeds=prompts[0], negative_prompt_embeds=prompts[1],
        prompt_attention_mask=torch.ones(1, 5), negative_prompt_attention_mask=torch.ones(1, 5),
        num_inference_steps=6, height=8, width=8, use_resolution_binning=False, output_type="latent",
        return_dict=False, generator=torch.Generator().manual_seed(0),
    )[0]  # fmt: skip
    shiva_ext.disable(pipe)
    return found, handle


WITHOUT = {
    "pixart": (EVERY["pixart"][0], pixart_run),
    "dit": (
        lambda: EVERY["dit"][0](num_embeds_ada_norm=1000),
        lambda model, source: dit_run(model, DDIMScheduler(), source),
    ),
}


@pytest.mark.parametrize(
    ("family", "config"),
    [(family, config) for family in WITHOUT for config in (fbc, taylor, mag, pab, faster)][:-1],  # see below
)
def test_families_without_a_cache_of_their_own(family, config):
    build, once = WITHOUT[family]
    model = build()
    dense, _ = once(model, None)
    first, handle = once(model, config())
    second, _ = once(model, config())
    assert torch.equal(first, second) and not torch.equal(first, dense) and first.isfinite().all()
    assert 0 < handle.peak_bytes <= 4 * handle.cache.memory_bound(4, 4, 16, 5, 64) and handle.bytes == 0
    assert torch.equal(once(model, None)[0], dense) and not left_on(model)


def test_fastercache_is_refused_where_the_unconditional_half_is_the_second():
    model = EVERY["dit"][0]()
    with pytest.raises(ValueError, match="wants the unconditional half first, and DiT's pipeline has it last"):
        shiva_ext.enable(model, DiffusersCache(faster(), steps=STEPS))
    assert not left_on(model)


def test_taylorseer_of_order_zero_is_fora():
    """As a schedule: computes at steps 0, 2, 4, ... and the last."""
    config = taylor(max_order=0, disable_cache_after_step=5)
    torch.testing.assert_close(sd3_run(config)[0], sd3_run(FORA(2))[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_first_block_cache_leaves_the_other_blocks_out():
    model = tiny.make_model()
    counts = [Forwards(block) for block in model.transformer_blocks]
    sd3_run(FirstBlockCacheConfig(threshold=1e9), model=model)
    assert [len(each.given) for each in counts] == [6, 1, 1, 1]


def test_seacache_skips_steps_of_videos_and_is_told_the_level():
    model = build_wan()
    calls = calls_of("wan", model)
    dense = run(model, calls)
    counts = Forwards(model.blocks[1])

    class Pipe:
        def __init__(self):
            self.transformer, self.scheduler, self.do_classifier_free_guidance = (
                model, FlowMatchEulerDiscreteScheduler(), False,
            )  # fmt: skip

        @torch.no_grad()
        def __call__(self):
            self.scheduler.set_timesteps(STEPS)
            found = []
            for call, t in zip(calls, self.scheduler.timesteps, strict=True):
                found.append(self.transformer(**call | {"timestep": t.expand(2)})[0])
                self.scheduler.step(found[-1], t, call["hidden_states"])
            return found

    pipe = Pipe()
    with shiva_ext.enable(pipe, sea(), batched_guidance=False):
        first, second = pipe(), pipe()
    assert len(counts.given) == 2 * 3  # the first, the one after two reused ones, the last
    assert all(map(torch.equal, first, second)) and torch.equal(run(model, calls)[0], dense[0])
    with (
        shiva_ext.enable(model, DiffusersCache(sea(), steps=STEPS)),
        pytest.raises(RuntimeError, match="on the pipeline"),
    ):
        model(**calls[0])


# ------------------------------------------------------------------------------------------------- what it leaves open


@pytest.mark.parametrize("name", ["flux", "wan", "qwenimage", "sd3"])
@pytest.mark.parametrize("config", [fbc, taylor, mag, pab, distilled])
@pytest.mark.parametrize("contexts", [True, False])
@torch.no_grad()
def test_halves_of_guidance_in_two_calls_do_not_see_each_other(name, config, contexts, monkeypatch):
    """Also for PyramidAttentionBroadcast and FasterCache, which have one memory for all calls."""
    model = EVERY[name][0]()
    branches = [calls_of(name, model, seed=seed) for seed in (0, 7)]

    if config in (pab, distilled):  # which ask for a scheduler's timestep
        monkeypatch.setattr(CacheState, "timestep", 500)

    def outputs(steps):
        found = []
        with shiva_ext.enable(model, DiffusersCache(config(), steps=STEPS)):
            for calls in steps:
                for label, call in zip(("cond", "uncond"), calls, strict=False):
                    if contexts:
                        _set_cache_context(model, CacheContext(label))
                    found.append(model(**call)[0])
                    if contexts:
                        _set_cache_context(model, None)
        return found

    alone = [outputs([[call] for call in calls]) for calls in branches]
    together = outputs(zip(*branches, strict=True))
    for branch in (0, 1):
        assert all(map(torch.equal, together[branch::2], alone[branch]))
        assert not all(map(torch.equal, alone[branch], run(model, branches[branch])))


@pytest.mark.parametrize("config", FOR_FLUX)
def test_a_bare_model_in_a_cache_context_of_ones_own(config):
    """Every run begins empty, also where that is found out within the context."""
    if config in (pab, distilled):
        pytest.skip("asks for a scheduler's timesteps")
    model = EVERY["flux"][0]()
    calls = calls_of("flux", model)

    def once():
        found = []
        for call in calls:
            with model.cache_context("cond"), torch.no_grad():
                found.append(model(**call)[0])
        return found

    with shiva_ext.enable(model, DiffusersCache(config(), steps=STEPS)):
        assert all(map(torch.equal, once(), once()))


@pytest.mark.parametrize("config", [fbc, taylor, mag, pab, faster])
def test_another_scheduler_size_batch_or_broken_run(config):
    pipe = sd3_pipe()
    shiva_ext.enable(pipe, config())
    wanted = pipe(**tiny.pipeline_inputs(2, 6))[0]
    for options in (dict(prompts=1), dict(size=12), dict(steps=5), dict(steps=1)):
        found = pipe(**tiny.pipeline_inputs(**{"prompts": 2, "steps": 6, **options}))[0]
        assert torch.equal(found, sd3_run(config(), **options)[0]), options
    pipe.transformer.proj_out.forward = fail
    with pytest.raises(MemoryError):
        pipe(**tiny.pipeline_inputs(2, 6, seed=9))
    del pipe.transformer.proj_out.forward
    assert torch.equal(pipe(**tiny.pipeline_inputs(2, 6))[0], wanted)
    flux = flux_pipe()
    if config is not faster:
        shiva_ext.enable(flux, config())
        wanted = flux(**flux_inputs(False))[0]
        flux.scheduler = type(flux.scheduler)()
        assert torch.equal(flux(**flux_inputs(False))[0], wanted)


@pytest.mark.parametrize("config", [fbc, taylor, mag, pab, faster])
def test_skip_layer_guidance_is_computed_and_not_stored(config):
    """With the last layer left out, too, where caches look for what the blocks have added."""
    for layers in ([1], [3]):
        model, plain, pairs = tiny.make_model(), tiny.make_model(), []
        wanted = sd3_run(config())[0]
        pipe = sd3_pipe(model)
        with shiva_ext.enable(pipe, config()):
            cached = model.forward

            def twice(*args, cached=cached, layers=layers, plain=plain, pairs=pairs, **kwargs):
                output = cached(*args, **kwargs)
                half = {k: v[2:] if torch.is_tensor(v) else v for k, v in kwargs.items()} | {"skip_layers": layers}
                pairs.append((cached(**half)[0], plain(**half)[0]))
                return output

            model.forward = twice
            assert torch.equal(pipe(**tiny.pipeline_inputs(2, 6))[0], wanted)
            model.forward = cached
        assert len(pairs) == 6 and all(torch.equal(*pair) for pair in pairs)


def test_hooks_that_came_later_stay():
    model = tiny.make_model()
    dense = model(**tiny.make_inputs())[0]
    for config in (fbc, taylor, pab):
        handle = shiva_ext.enable(sd3_pipe(model), config())
        model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
        handle.disable()
        casting = [m for m in model.modules() if hasattr(m, "_diffusers_hook")]
        assert casting and all(m._diffusers_hook.get_hook("layerwise_casting") is not None for m in casting)
        found = model(**tiny.make_inputs())[0]
        assert found.dtype == dense.dtype and found.isfinite().all()
        model = tiny.make_model()


def test_memory_counts_every_tensor_once():
    model = tiny.make_model()
    calls = calls_of("sd3", model)
    with shiva_ext.enable(model, DiffusersCache(FirstBlockCacheConfig(1e-9), steps=STEPS)) as handle, torch.no_grad():
        model(**calls[0])
        image, text = 2 * tiny.N * 64 * 4, 2 * 3 * 64 * 4
        # The first block's output of both streams and its change of the image, and what the others added to both.
        assert handle.bytes == 3 * image + 2 * text


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("config", [fbc, taylor, mag, pab, faster, distilled, sea])
@torch.no_grad()
def test_what_cannot_run_says_so_and_leaves_nothing(name, config):
    model = EVERY[name][0]()
    before = tiny.snapshot(model)
    dense = model(**calls_of(name, model)[0])[0]
    try:
        handle = shiva_ext.enable(model, DiffusersCache(config(), steps=STEPS))
    except ValueError as error:
        assert f"diffusers' {DiffusersCache(config()).name}" in str(error) and type(model).__name__ in str(error)
        refused = {("sana", fbc), ("sana", mag), ("dit", faster)} | {(n, sea) for n in EVERY if n != "wan"}
        assert (name, config) in refused, error
    else:
        handle.disable()
    tiny.assert_unchanged(model, before)
    assert torch.equal(model(**calls_of(name, model)[0])[0], dense)


def test_fastercache_without_an_unconditional_half_is_refused():
    for call in (lambda: sd3_run(faster(), guidance=1.0), lambda: enable_and_run(flux_pipe(), faster())):
        with pytest.raises(ValueError, match="is_guidance_distilled=True"):
            call()


def enable_and_run(pipe, config):
    shiva_ext.enable(pipe, config)
    return pipe(**flux_inputs(False))


def test_selections_beside_diffusers_caches():
    for config in (taylor, pab, faster):
        pipe = sd3_pipe()
        for order in (0, 1):
            sources = (RandomSelector(0.5), config())
            shiva_ext.enable(pipe, sources[order])
            with pytest.raises(ValueError, match="lets them run on other tokens every step"):
                shiva_ext.enable(pipe, sources[1 - order])
            shiva_ext.disable(pipe)
        shiva_ext.enable(pipe, ToMeSD(0.5))
        shiva_ext.enable(pipe, config())
        assert pipe(**tiny.pipeline_inputs(2, 6))[0].isfinite().all()
    for config in (fbc, mag, taylor):
        pipe = sd3_pipe()
        shiva_ext.enable(pipe, SDTM())
        with pytest.raises(ValueError, match="SDTM carries tensors from step to step"):
            shiva_ext.enable(pipe, config())
    for config in (fbc, mag):
        results = []
        for order in ((0, 1), (1, 0)):
            model = tiny.make_model()
            pipe = sd3_pipe(model)
            handles = [shiva_ext.enable(pipe, (tiny.make_artifact(0.6), config())[i]) for i in order]
            results.append(pipe(**tiny.pipeline_inputs(2, 6))[0])
            for handle in handles:
                handle.disable()
            assert not left_on(model)
        assert torch.equal(*results) and not torch.equal(results[0], sd3_run(config())[0])


def test_one_takes_the_place_of_the_other():
    pipe = sd3_pipe()
    dense = pipe(**tiny.pipeline_inputs(2, 6))[0]
    for source in (fbc(), FORA(2), taylor(), TeaCache(1e9, "identity"), pab()):
        shiva_ext.enable(pipe, source)
        assert torch.equal(pipe(**tiny.pipeline_inputs(2, 6))[0], sd3_run(source)[0])
    with pytest.raises(ValueError, match="SeaCache does not run on SD3Transformer2DModel"):
        shiva_ext.enable(pipe, sea())
    assert torch.equal(pipe(**tiny.pipeline_inputs(2, 6))[0], sd3_run(pab())[0])  # the one before is still there
    shiva_ext.disable(pipe)
    assert torch.equal(pipe(**tiny.pipeline_inputs(2, 6))[0], dense) and not left_on(pipe.transformer)


def test_a_compiled_transformer_is_refused():
    pipe = sd3_pipe()
    shiva_ext.enable(pipe, fbc())
    pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="FORA"):
        pipe(**tiny.pipeline_inputs(1, 2))


def test_only_configs_of_caches_are_taken():
    assert len(CONFIGS) == 6
    with pytest.raises(TypeError, match="config is a str, wanted one of FasterCacheConfig"):
        DiffusersCache("first block")
