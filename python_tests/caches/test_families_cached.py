"""Caches on all seven families, beside selections, pipelines, and what else people put on a model."""

import copy
import functools
import tempfile
import threading
import warnings
from dataclasses import replace

import accelerate
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxPipeline,
    HeunDiscreteScheduler,
    PNDMScheduler,
    SCMScheduler,
)
from diffusers.hooks import apply_group_offloading
from models import tiny
from models.every_family import EVERY
from models.families import build_wan
from models.test_families import PIPELINES, dit_pipeline
from models.test_together import add_lora
from torch import nn
from torch._dynamo.testing import CompileCounter

import shiva_ext
from shiva_ext.caches import FORA, SmoothCache, TeaCache
from shiva_ext.caches.teacache import Stack
from shiva_ext.methods import ToMeSD
from shiva_ext.models import adapter_for
from shiva_ext.models.per_sample import PerSampleAdapter
from shiva_ext.selection import RandomSelector, RatioTable
from shiva_ext.training.config import TrainConfig
from shiva_ext.training.trainer import ShivaTrainer

pytestmark = pytest.mark.usefixtures("one_thread")
every_family = pytest.mark.parametrize("name", EVERY)
LEVELS = (0.95, 0.75, 0.55, 0.35, 0.15)
STEPS = len(LEVELS)
ALWAYS = TeaCache(1e9, "identity", steps=STEPS)  # reuses wherever it may


def calls_of(name: str, model, batch: int = 2, seed: int = 0, pace: float = 0.1, paces=None) -> list[dict]:
    """Calls of a run whose latents move from step to step, in each sample by a pace of its own."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for level in LEVELS:
        size = {"flux": (4,), "sd3": (8,), "pixart": (8,)}.get(name, ())
        call = EVERY[name][1](model, batch, *size, level)
        x = call["hidden_states"]
        own = torch.tensor(paces or [pace] * batch).view(-1, *[1] * (x.ndim - 1))
        call["hidden_states"] = x + own * torch.randn(x.shape, generator=generator)
        found.append(call)
    return found


def pick(call: dict, rows: slice, batch: int) -> dict:
    """Some samples of a call."""
    shared = ("img_ids", "txt_ids")
    own = {k: v[rows] for k, v in call.items() if torch.is_tensor(v) and k not in shared and len(v) == batch}
    return call | own | ({"img_shapes": call["img_shapes"][rows]} if "img_shapes" in call else {})


@torch.no_grad()
def run(model, calls: list[dict]) -> list[torch.Tensor]:
    return [model(**call)[0] for call in calls]


def blocks_of(model) -> list[nn.Module]:
    return adapter_for(model).blocks(model)


class Forwards:
    """Collects what a module's own forward, below all hooks, gives."""

    def __init__(self, module):
        self.module, self.given, self.forward = module, [], module.forward
        functools.update_wrapper(self, self.forward, updated=())  # hooks read the signature
        module.forward = self

    def __call__(self, *args, **kwargs):
        self.given.append(self.forward(*args, **kwargs))
        return self.given[-1]


def left_on(model) -> list[str]:
    return [name for name, m in model.named_modules() if hasattr(m, "_diffusers_hook") or "forward" in vars(m)]


# ------------------------------------------------------------------------------------------------------ every family


@every_family
def test_computing_always_is_the_model_bit_for_bit(name):
    model = EVERY[name][0]()
    calls = calls_of(name, model)
    dense = run(model, calls)
    for cache in (FORA(1, steps=STEPS), TeaCache(0.0, "identity", steps=STEPS)):
        with shiva_ext.enable(model, cache):
            assert all(map(torch.equal, run(model, calls), dense))
    assert not left_on(model) and all(map(torch.equal, run(model, calls), dense))


@every_family
def test_every_module_runs_at_the_scheduled_steps_alone(name):
    model = EVERY[name][0]()
    sites = [
        (kind, m) for b in blocks_of(model) for kind, ms in adapter_for(model).cache_sites(b).items() for m, _ in ms
    ]
    schedules = {"attention": (1, 0, 0, 1, 1), "mlp": (1, 0, 1, 0, 1), "cross_attention": (1, 1, 0, 0, 1)}
    schedules = {kind: schedules[kind] for kind in dict(sites)}
    counted = [(kind, Forwards(m)) for kind, m in sites]
    calls = calls_of(name, model)
    with shiva_ext.enable(model, SmoothCache(schedules)):
        first, second = run(model, calls), run(model, calls)
    assert all(len(forwards.given) == 2 * sum(schedules[kind]) for kind, forwards in counted)
    assert all(map(torch.equal, first, second))


@every_family
@torch.no_grad()
def test_a_skipped_step_adds_what_the_blocks_added_last(name):
    model, by_hand = EVERY[name][0](), EVERY[name][0]()
    calls = calls_of(name, model)
    counts = [Forwards(block) for block in blocks_of(model)]
    with shiva_ext.enable(model, ALWAYS):
        found = run(model, calls)
    assert {len(each.given) for each in counts} == {2}
    adapter, blocks = adapter_for(by_hand), blocks_of(by_hand)
    place = {}

    def entry(module, args, kwargs):
        place["entry"] = kwargs.get("hidden_states", args[0] if args else None)

    def exit_(module, args, output):
        if place["step"] in (0, STEPS - 1):
            place["added"] = adapter.image_tokens(output) - place["entry"]
        return adapter.with_image_tokens(output, place["entry"] + place["added"])

    blocks[0].register_forward_pre_hook(entry, with_kwargs=True)
    blocks[-1].register_forward_hook(exit_)
    for step, call in enumerate(calls):
        place["step"] = step
        torch.testing.assert_close(found[step], by_hand(**call)[0], rtol=1e-4, atol=1e-5)


@every_family
@pytest.mark.parametrize("selected", [False, True])
def test_an_image_does_not_see_the_others_of_its_batch(name, selected):
    model, artifact = EVERY[name][0](), EVERY[name][2]
    calls = calls_of(name, model, batch=3, paces=[0.02, 0.4, 1.5])
    seen = Forwards(blocks_of(model)[1])
    with shiva_ext.enable(model, TeaCache(0.6, "identity", steps=STEPS)):
        if selected:
            shiva_ext.enable(model, artifact(model))
        together = run(model, calls)
        sizes = {len(adapter_for(model).image_tokens(given)) for given in seen.given}
        alone = [run(model, [pick(call, slice(b, b + 1), 3) for call in calls]) for b in range(3)]
    shiva_ext.disable(model)
    # Wan decides by the step alone, which is the same for all.
    assert sizes & {1, 2} or name == "wan", "all images decided alike: the test shows nothing"
    for step, output in enumerate(together):
        for b in range(3):
            torch.testing.assert_close(output[b : b + 1], alone[b][step], rtol=1e-4, atol=2e-5)


class Ledger:
    """What each token of each sample got when a module computed it last."""

    def __init__(self, tokens: int):
        self.tokens, self.rows = tokens, {}

    def split(self, part, kept: list[list[int]], samples: list[int], as_map: bool):
        """(key, row) of everything in a part [b,n,c]; what is before the image is text."""
        part = part.flatten(2).transpose(1, 2) if as_map else part.flatten(1, -2)
        for b, sample in enumerate(samples):
            text = part.shape[1] - len(kept[sample])
            for i in range(text):
                yield (sample, "text", i), part[b, i]
            for i, token in enumerate(kept[sample]):
                yield (sample, "image", token), part[b, text + i]


@every_family
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("ratios", [(1, 0.5, 0.7, 0.5, 1), (0.5, 1, 0.5, 0.6, 0.6)], ids=["dense first", "dense later"])
@torch.no_grad()
def test_beside_a_selection_every_token_gets_its_own_last_output(name, fused, ratios):
    """Token by token, also where a layer turns from dense to pruned between a computed and a reused step."""
    model, artifact, batch, layer = EVERY[name][0](), EVERY[name][2], 2, 2
    calls = calls_of(name, model, pace=1.0)
    adapter = adapter_for(model)
    table = torch.tensor(ratios).flip(0)[:, None].repeat(1, len(blocks_of(model))).float()
    table[:, 0] = 1
    source = replace(artifact(model), table=RatioTable(sorted(LEVELS), table))
    sites = adapter.cache_sites(blocks_of(model)[layer])
    watched = [(m, parts, Forwards(m)) for ms in sites.values() for m, parts in ms]
    with (
        shiva_ext.enable(model, source, fused=fused) as handle,
        shiva_ext.enable(model, FORA(3, steps=STEPS)),
    ):
        handle.record()
        outer = [Forwards(m) for m, _, _ in watched]
        per_step = []
        for call in calls:
            counts = [(len(o.given), len(inner.given)) for o, (_, _, inner) in zip(outer, watched, strict=True)]
            model(**call)
            per_step.append(counts)
        records = [record["kept"].get(layer) for record in handle.records]
        for each in outer:
            each.module.forward = each.forward
    N = adapter.num_tokens(model) if name in ("sd3", "pixart", "dit") else {"flux": 16, "sana": 24}.get(name)
    N = N or {"qwenimage": 16, "wan": 24}[name]
    assert any(r is not None and r.shape[1] < N for r in records) and any(r is None for r in records)
    for site, (_, parts, inner) in enumerate(watched):
        ledger, per_sample = Ledger(N), isinstance(adapter, PerSampleAdapter)
        for step in range(STEPS):
            kept = [list(range(N))] * batch if records[step] is None else records[step].tolist()
            upto = per_step[step + 1][site] if step + 1 < STEPS else (None, None)
            given = outer[site].given[per_step[step][site][0] : upto[0]]
            computed = inner.given[per_step[step][site][1] : upto[1]]
            assert len(given) == (batch if per_sample and records[step] is not None else 1)
            assert len(computed) == (len(given) if step in (0, 3, 4) else 0)
            for call, outputs in enumerate(given):
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                samples = list(range(batch)) if len(given) == 1 else [call]
                for what, part in zip(parts, outputs, strict=False):
                    tokens = {s: [] for s in samples} if what == "text" else kept
                    for key, row in ledger.split(part, tokens, samples, what == "map"):
                        key = (what, *key)
                        if computed:
                            ledger.rows[key] = row.clone()
                        wanted = ledger.rows.get(key)
                        torch.testing.assert_close(row, torch.zeros_like(row) if wanted is None else wanted)


@every_family
@pytest.mark.parametrize("cache", [FORA(2, steps=STEPS), TeaCache(0.5, "identity", steps=STEPS)], ids=lambda c: c.name)
@torch.no_grad()
def test_guidance_in_two_calls_has_a_memory_each(name, cache):
    model = EVERY[name][0]()
    branches = [calls_of(name, model, seed=seed) for seed in (0, 7)]
    with shiva_ext.enable(model, cache):
        alone = [run(model, calls) for calls in branches]
        together = [run(model, pair) for pair in zip(*branches, strict=True)]
    if hasattr(model, "cache_context"):
        with shiva_ext.enable(model, cache):
            named = []
            for pair in zip(*branches, strict=True):
                for label, call in zip(("cond", "uncond"), pair, strict=True):
                    with model.cache_context(label):
                        named.append(model(**call)[0])
        assert all(map(torch.equal, named, [each for pair in together for each in pair]))
    for branch in (0, 1):
        assert all(torch.equal(together[step][branch], alone[branch][step]) for step in range(STEPS))


@every_family
@torch.no_grad()
def test_another_batch_or_an_unfinished_run_leaves_nothing_to_the_next(name):
    model = EVERY[name][0]()
    small, large = calls_of(name, model, batch=1), calls_of(name, model, batch=2)
    for cache in (FORA(3, steps=STEPS), ALWAYS):
        with shiva_ext.enable(model, cache):
            wanted = run(model, large)
            run(model, small)
            run(model, small[:2])  # unfinished
            assert all(map(torch.equal, run(model, large), wanted))


@every_family
@torch.no_grad()
def test_half_precision_stays_half_precision(name):
    model = EVERY[name][0]().to(torch.bfloat16)
    calls = [
        {
            k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() and k != "timestep" else v
            for k, v in c.items()
        }
        for c in calls_of(name, model, batch=3, paces=[0.02, 0.4, 1.5])
    ]
    dense = run(model, calls)
    for cache in (FORA(2, steps=STEPS), TeaCache(0.6, "identity", steps=STEPS)):
        with shiva_ext.enable(model, cache):
            found = run(model, calls)
        assert all(a.dtype == b.dtype and a.isfinite().all() for a, b in zip(found, dense, strict=True))
        assert torch.equal(found[0], dense[0]) and not all(map(torch.equal, found, dense))


@every_family
@pytest.mark.parametrize("cached_first", [True, False])
@torch.no_grad()
def test_a_users_lora_counts_before_and_after(name, cached_first):
    model, plain = EVERY[name][0](), EVERY[name][0]()
    calls = calls_of(name, model)
    add_lora(plain, dora=False)
    with shiva_ext.enable(plain, FORA(2, steps=STEPS)):
        wanted = run(plain, calls)
    if not cached_first:
        add_lora(model, dora=False)
    with shiva_ext.enable(model, FORA(2, steps=STEPS)):
        if cached_first:
            add_lora(model, dora=False)
        assert all(map(torch.equal, run(model, calls), wanted))


def sequential(model) -> None:
    accelerate.cpu_offload(model, execution_device="cpu")


def grouped(model) -> None:
    cpu = torch.device("cpu")
    options = dict(offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=tempfile.mkdtemp())
    apply_group_offloading(model, cpu, cpu, **options)


@pytest.mark.parametrize("name", [name for name in EVERY if name != "dit"])  # its head reads its first block's norm
@pytest.mark.parametrize("offload", [sequential, grouped])
@pytest.mark.parametrize("offloaded_first", [True, False])
@torch.no_grad()
def test_offloaded_weights_are_there_for_the_decision(name, offload, offloaded_first):
    model, plain = EVERY[name][0](), EVERY[name][0]()
    calls, cache = calls_of(name, model), TeaCache(0.5, "identity", steps=STEPS)
    with shiva_ext.enable(plain, cache):
        wanted = run(plain, calls)
    if offloaded_first:
        offload(model)
    with shiva_ext.enable(model, cache):
        if not offloaded_first:
            offload(model)
        assert all(map(torch.equal, run(model, calls), wanted))
    assert torch.equal(model(**calls[0])[0], plain(**calls[0])[0])


@every_family
@torch.no_grad()
def test_layerwise_casting_beside_a_cache(name):
    model = EVERY[name][0]()
    calls = calls_of(name, model)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    dense = run(model, calls)
    for cache in (FORA(1, steps=STEPS), TeaCache(0.0, "identity", steps=STEPS)):
        with shiva_ext.enable(model, cache):
            assert all(map(torch.equal, run(model, calls), dense))
    with shiva_ext.enable(model, FORA(2, steps=STEPS)):
        assert all(each.isfinite().all() for each in run(model, calls))
    assert all(map(torch.equal, run(model, calls), dense))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@every_family
@torch.no_grad()
def test_what_is_not_finite_is_computed_and_does_not_stay(name, bad):
    model = EVERY[name][0]()
    calls = calls_of(name, model)
    calls[1] = calls[1] | {"hidden_states": torch.full_like(calls[1]["hidden_states"], bad)}
    dense = run(model, calls)
    # Alternating signs: at an infinite change the polynomial is minus infinity.
    cache = TeaCache(1e9, (-1.0, 1.0, 0.0), steps=STEPS)
    with shiva_ext.enable(model, cache):
        found = run(model, calls)
    assert torch.equal(found[-1], dense[-1]) and found[-1].isfinite().all()
    if name != "wan":  # which decides by the step alone
        assert torch.equal(found[2], dense[2])


def test_an_infinite_change_is_computed_whatever_the_polynomial_makes_of_it():
    cache = TeaCache(1e9, (-1.0, 1.0, 0.0))
    stack = Stack(cache, cache.coefficients, None)
    now, nothing = torch.ones(2, 3, 4), torch.zeros(2, 3, 4)
    assert stack._compare(now, nothing, 2, [0.0, 0.0]) == [True, True]
    assert stack._compare(now, now, 2, [0.0, 0.0]) == [False, False]


# ---------------------------------------------------------------------------------------------------------- pipelines


def dit_run(model, scheduler, source=None, steps: int = 6):
    torch.manual_seed(0)
    pipe, inputs = dit_pipeline(model)
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    handle = None if source is None else shiva_ext.enable(pipe, source, batched_guidance=True)
    found = pipe(**inputs, num_inference_steps=steps, generator=torch.Generator().manual_seed(0))[0]
    shiva_ext.disable(pipe)
    return found, handle


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [
        (DDIMScheduler, 6), (DDPMScheduler, 6), (PNDMScheduler, 15), (DPMSolverMultistepScheduler, 6),
        (EulerDiscreteScheduler, 6), (HeunDiscreteScheduler, 11),
    ],
)  # fmt: skip
def test_the_step_is_known_with_every_scheduler(scheduler, steps):
    """DDIM and its like have no number of the step; a Heun step is two calls."""
    model = EVERY["dit"][0](num_embeds_ada_norm=1000)
    dense, _ = dit_run(model, scheduler())
    forwards = Forwards(model.transformer_blocks[1].ff)
    same, _ = dit_run(model, scheduler(), FORA(1))
    assert torch.equal(same, dense) and len(forwards.given) == steps
    forwards.given.clear()
    found, handle = dit_run(model, scheduler(), FORA(3))
    computed = {step for step in range(steps) if step % 3 == 0 or step == steps - 1}
    assert len(forwards.given) == len(computed) and not torch.equal(found, dense)
    assert handle.bytes == 0 < handle.peak_bytes
    forwards.given.clear()
    _, handle = dit_run(model, scheduler(), TeaCache(1e9, "identity"))
    assert len(forwards.given) == 2 and handle.state.last == (4, 2 * (steps - 2))


@pytest.mark.parametrize(("name", "selected"), [("dit", False), ("sana", True), ("qwenimage", True), ("wan", False)])
def test_the_families_own_pipelines(name, selected):
    """DiT's runs on DDIM, Sana's on DPM-Solver; Qwen-Image's and Wan's guide in two calls, which they name."""
    torch.manual_seed(0)
    model = EVERY[name][0](**(dict(num_embeds_ada_norm=1000) if name == "dit" else {}))
    pipe, arguments = PIPELINES[name](model)
    pipe.set_progress_bar_config(disable=True)
    guided = True if name == "dit" else None

    def generate():
        return pipe(num_inference_steps=6, generator=torch.Generator().manual_seed(0), **arguments)[0]

    forwards = Forwards(adapter_for(model).cache_sites(blocks_of(model)[0])["mlp"][0][0])
    if selected:
        shiva_ext.enable(pipe, EVERY[name][2](model), batched_guidance=guided)
    plain, calls = generate(), len(forwards.given)
    for cache, share in ((FORA(1), 1), (FORA(2), 4 / 6), (TeaCache(1e9, "identity"), 2 / 6), (fbc(), 1)):
        if name == "sana" and cache == fbc():
            continue  # diffusers does not know its blocks
        forwards.given.clear()
        handle = shiva_ext.enable(pipe, cache, batched_guidance=guided)
        first = generate()
        assert len(forwards.given) == share * calls
        assert torch.equal(first, generate()) and torch.equal(first, plain) == (cache == FORA(1))
        assert handle.bytes == 0 < handle.peak_bytes and first.isfinite().all()
        handle.disable()
    assert torch.equal(generate(), plain)
    shiva_ext.disable(pipe)
    assert not [name for name, m in model.named_modules() if name and hasattr(m, "_diffusers_hook")]


def fbc():
    return FirstBlockCacheConfig(threshold=9.0)


def sd3_pipe(model=None, scheduler=None):
    return tiny.make_pipeline(model or tiny.make_model(), scheduler=scheduler)


def test_flow_matching_with_heun_steps():
    def make():
        return sd3_pipe(scheduler=FlowMatchHeunDiscreteScheduler())

    inputs = dict(prompts=2, steps=4)
    dense = make()(**tiny.pipeline_inputs(**inputs))[0]
    pipe = make()
    forwards = Forwards(pipe.transformer.transformer_blocks[1].ff)
    with shiva_ext.enable(pipe, FORA(1)):
        assert torch.equal(pipe(**tiny.pipeline_inputs(**inputs))[0], dense)
    calls = len(forwards.given)
    with shiva_ext.enable(pipe, FORA(2)) as handle:
        pipe(**tiny.pipeline_inputs(**inputs))
    assert len(forwards.given) - calls == len({*range(0, calls, 2), calls - 1}) and handle.bytes == 0


@pytest.mark.parametrize("first", [1, 2])
def test_an_image_to_start_from_begins_in_the_middle_of_the_schedule(first):
    pipe = tiny.make_img2img(tiny.make_model())
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    forwards = Forwards(pipe.transformer.transformer_blocks[1].ff)

    def call():
        forwards.given.clear()
        inputs = tiny.pipeline_inputs(1, 8)
        inputs.pop("height"), inputs.pop("width")
        found = pipe(image=image, strength=0.625, **inputs)[0]  # 5 of 8 steps, from the fourth on
        return found, len(forwards.given)

    dense, steps = call()
    assert steps == 5
    with shiva_ext.enable(pipe, FORA(1)):
        assert torch.equal(call()[0], dense)
    with shiva_ext.enable(pipe, FORA(2)):  # steps 3 (the first that there is), 4, 6 and 7 of 0 to 7
        assert call()[1] == 4
    with shiva_ext.enable(pipe, TeaCache(1e9, "identity", first=first)) as handle:
        once, again = call(), call()
        assert once[1] == first + 1 and torch.equal(once[0], again[0]) and handle.bytes == 0


def test_another_scheduler_may_take_the_place_of_the_first():
    pipe = sd3_pipe()
    forwards = Forwards(pipe.transformer.transformer_blocks[1].ff)
    for cache in (FORA(2), TeaCache(1e9, "identity")):
        shiva_ext.enable(pipe, cache)
        wanted = pipe(**tiny.pipeline_inputs(2, 6))[0]
        before, pipe.scheduler = pipe.scheduler, FlowMatchEulerDiscreteScheduler()
        forwards.given.clear()
        assert torch.equal(pipe(**tiny.pipeline_inputs(2, 6))[0], wanted)
        assert len(forwards.given) == (4 if isinstance(cache, FORA) else 2)
        assert "step" not in vars(before)
        shiva_ext.disable(pipe)
        assert "step" not in vars(pipe.scheduler)


@pytest.mark.parametrize("cache", [FORA(3), TeaCache(1e9, "identity")], ids=lambda c: c.name)
def test_another_size_batch_and_number_of_steps(cache):
    pipe = sd3_pipe()
    shiva_ext.enable(pipe, cache)
    for options in (dict(prompts=2), dict(prompts=1), dict(size=12), dict(steps=7), dict(steps=1), dict(guidance=1.0)):
        found = pipe(**tiny.pipeline_inputs(**{"steps": 5, **options}))[0]
        fresh = sd3_pipe()
        shiva_ext.enable(fresh, cache)
        assert torch.equal(found, fresh(**tiny.pipeline_inputs(**{"steps": 5, **options}))[0]), options


def run_whose_guidance_ends(pipe):
    def end_guidance(pipe, step, timestep, tensors):
        if step == 2:
            pipe._guidance_scale = 1.0
            for name in ("prompt_embeds", "pooled_prompt_embeds"):
                tensors[name] = tensors[name][-2:]
        return tensors

    names = ["prompt_embeds", "pooled_prompt_embeds"]
    return pipe(
        **tiny.pipeline_inputs(2, 6),
        callback_on_step_end=end_guidance, callback_on_step_end_tensor_inputs=names,
    )[0]  # fmt: skip


def test_guidance_that_ends_within_a_run():
    pipe = sd3_pipe()
    dense = run_whose_guidance_ends(pipe)
    for cache, same in ((FORA(1), True), (TeaCache(0.0, "identity"), True), (FORA(4), False), (ALWAYS, False)):
        with shiva_ext.enable(pipe, cache):
            found = run_whose_guidance_ends(pipe)
        assert found.isfinite().all() and torch.equal(found, dense) == same


def test_runs_that_break_off_leave_nothing():
    pipe = sd3_pipe()

    def stop(pipe, step, timestep, tensors):
        if step == 2:
            raise KeyboardInterrupt
        return tensors

    for cache in (FORA(3), TeaCache(1e9, "identity")):
        handle = shiva_ext.enable(pipe, cache)
        wanted = pipe(**tiny.pipeline_inputs(2, 6))[0]
        with pytest.raises(KeyboardInterrupt):
            pipe(**tiny.pipeline_inputs(2, 6, seed=9), callback_on_step_end=stop)
        assert torch.equal(pipe(**tiny.pipeline_inputs(2, 6))[0], wanted) and handle.bytes == 0


def fail(*args, **kwargs):
    raise MemoryError


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("at", [0, 2])
@torch.no_grad()
def test_a_step_that_fails_and_is_made_again_does_not_swap_the_halves_of_guidance(failing, at):
    model, fresh = EVERY["flux"][0](), EVERY["flux"][0]()
    pairs = list(zip(calls_of("flux", model), calls_of("flux", model, seed=7), strict=True))
    for cache in (FORA(4, steps=STEPS), ALWAYS):
        with shiva_ext.enable(model, cache):
            for pair in pairs[:at]:
                run(model, pair)
            run(model, pairs[at][:failing])
            model.time_text_embed.forward = fail
            with pytest.raises(MemoryError):
                model(**pairs[at][failing])
            del model.time_text_embed.forward
            run(model, pairs[at])
            rest = [run(model, pair) for pair in pairs[at + 1 :]]
        for half in (0, 1):
            with shiva_ext.enable(fresh, cache) as handle:
                run(fresh, [pair[half] for pair in pairs[: at + 1]])
                handle.state.new_run()  # what was stored is lost, the place in the run is not
                alone = run(fresh, [pair[half] for pair in pairs[at + 1 :]])
            assert all(torch.equal(pair[half], each) for pair, each in zip(rest, alone, strict=True))


def flux_pipe(**config):
    model = EVERY["flux"][0](**config)
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux_inputs(true_cfg: bool, steps: int = 6) -> dict:
    random = torch.Generator().manual_seed(0)
    prompts, pooled = torch.randn(2, 1, 3, 24, generator=random), torch.randn(2, 1, 20, generator=random)
    guided = dict(negative_prompt_embeds=prompts[1], negative_pooled_prompt_embeds=pooled[1], true_cfg_scale=3.0)
    return dict(
        prompt_embeds=prompts[0], pooled_prompt_embeds=pooled[0], height=64, width=64, num_inference_steps=steps,
        output_type="latent", return_dict=False, generator=torch.Generator().manual_seed(0),
        **(guided if true_cfg else {}),
    )  # fmt: skip


@pytest.mark.parametrize("cache", [FORA(2), TeaCache(1.5), TeaCache(1e9, "identity")], ids=str)
def test_flux_with_real_guidance_keeps_its_halves_apart(cache):
    pipe = flux_pipe()
    inputs = flux_inputs(true_cfg=True)
    dense = pipe(**inputs)[0]
    # A prompt guided against itself is that prompt: both halves decide alike, and each has its own memory.
    alike = inputs | dict(
        negative_prompt_embeds=inputs["prompt_embeds"], negative_pooled_prompt_embeds=inputs["pooled_prompt_embeds"]
    )
    with shiva_ext.enable(pipe, cache) as handle:
        alone = pipe(**flux_inputs(true_cfg=False))[0]
        found = pipe(**alike | dict(generator=torch.Generator().manual_seed(0)))[0]
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
        guided = pipe(**inputs | dict(generator=torch.Generator().manual_seed(0)))[0]
    assert guided.isfinite().all() and not torch.equal(guided, dense) and handle.bytes == 0


def test_a_scheduler_that_tells_no_level_is_refused_and_leaves_nothing():
    pipe = sd3_pipe()
    before = tiny.snapshot(pipe.transformer)
    pipe.scheduler = SCMScheduler()
    with pytest.raises(ValueError, match="SCMScheduler"):
        shiva_ext.enable(pipe, FORA(2))
    tiny.assert_unchanged(pipe.transformer, before)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    handle = shiva_ext.enable(pipe, FORA(3))
    wanted = pipe(**tiny.pipeline_inputs(1, 6))[0]
    pipe.scheduler, scheduler = SCMScheduler(), pipe.scheduler
    with pytest.raises(ValueError, match="SCMScheduler"):
        shiva_ext.enable(pipe, FORA(2))
    pipe.scheduler = scheduler
    assert torch.equal(pipe(**tiny.pipeline_inputs(1, 6))[0], wanted)  # the first is still there
    handle.disable()
    tiny.assert_unchanged(pipe.transformer, before)


def test_only_caches_that_look_at_halves_ask_about_guidance():
    pipe = DiTPipeline(transformer=EVERY["dit"][0](), vae=None, scheduler=DDIMScheduler())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shiva_ext.enable(pipe, FORA(2)).disable()
    with pytest.warns(UserWarning, match="does not tell whether it guides, so each half"):
        shiva_ext.enable(pipe, TeaCache(0.1, "identity"))


def test_two_transformers_of_a_pipeline_have_a_cache_each():
    class Both:
        def __init__(self):
            self.transformer, self.transformer_2 = build_wan(), build_wan()

    pipe = Both()
    with pytest.warns(UserWarning, match="second transformer"):
        shiva_ext.enable(pipe, FORA(2, steps=STEPS))
    shiva_ext.enable(pipe, FORA(2, steps=STEPS), component="transformer_2")
    shiva_ext.disable(pipe)
    assert not left_on(pipe.transformer) and not left_on(pipe.transformer_2)


# ------------------------------------------------------------------------------------------- models, threads and files


@torch.no_grad()
def test_two_models_at_once_in_two_threads():
    names = ("sd3", "sana")
    models = [EVERY[name][0]() for name in names]
    calls = [calls_of(name, model) for name, model in zip(names, models, strict=True)]
    for model, name in zip(models, names, strict=True):
        shiva_ext.enable(model, EVERY[name][2](model))
        shiva_ext.enable(model, TeaCache(0.4, "identity", steps=STEPS) if name == "sd3" else FORA(2, steps=STEPS))
    wanted = [run(model, own) for model, own in zip(models, calls, strict=True)]
    interleaved = list(zip(*([models[i](**calls[i][step])[0] for i in (0, 1)] for step in range(STEPS)), strict=True))
    found = [None, None]

    def work(i: int):
        with torch.no_grad():
            found[i] = [run(models[i], calls[i]) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in (0, 1):
        assert all(map(torch.equal, interleaved[i], wanted[i]))
        assert all(all(map(torch.equal, each, wanted[i])) for each in found[i])


@torch.no_grad()
def test_a_cached_model_is_saved_as_the_model(tmp_path):
    model = tiny.make_model()
    dense = model(**tiny.make_inputs())[0]
    with shiva_ext.enable(model, FORA(2, steps=3)), shiva_ext.enable(model, RandomSelector(0.5)):
        model(**tiny.make_inputs())
        model.save_pretrained(tmp_path)
        names = list(model.state_dict())
    loaded = type(model).from_pretrained(tmp_path)
    assert names == list(loaded.state_dict()) and torch.equal(loaded(**tiny.make_inputs())[0], dense)


def test_a_copy_of_the_scheduler_does_not_drive_the_cache():
    pipe = sd3_pipe()
    with shiva_ext.enable(pipe, FORA(2)) as handle:
        other = copy.deepcopy(pipe.scheduler)
        other.set_timesteps(9)
        assert handle.state.steps is None


@torch.no_grad()
def test_a_feed_forward_in_chunks():
    model, plain = EVERY["pixart"][0](), EVERY["pixart"][0]()
    calls = calls_of("pixart", model)
    with shiva_ext.enable(plain, FORA(3, steps=STEPS)):
        wanted = run(plain, calls)
    for block in model.transformer_blocks:
        block.set_chunk_feed_forward(4, 1)
    with shiva_ext.enable(model, FORA(3, steps=STEPS)):
        for a, b in zip(run(model, calls), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        with shiva_ext.enable(model, RandomSelector(0.5)), pytest.raises(ValueError, match="turn forward chunking off"):
            run(model, calls)


def test_the_summary_says_what_the_last_run_did():
    pipe = sd3_pipe()
    for cache, text in (
        (FORA(2), "4 of 6 calls computed everything in the last run"),
        (SmoothCache({"mlp": (1, 0, 1, 0, 0, 1)}), "3 of 6 calls computed everything in the last run"),
        (TeaCache(1e9, "identity"), "4 of 12 calls computed everything in the last run"),
    ):
        shiva_ext.enable(pipe, cache)
        pipe(**tiny.pipeline_inputs(2, 6))
        pipe(**tiny.pipeline_inputs(2, 6))
        assert text in str(shiva_ext.summary(pipe))


@torch.no_grad()
def test_two_attentions_of_a_block_are_both_kept():
    model = tiny.make_model(dual_attention_layers=(0, 1, 2))
    calls = calls_of("sd3", model)
    inner = [Forwards(model.transformer_blocks[1].attn), Forwards(model.transformer_blocks[1].attn2)]
    with shiva_ext.enable(model, FORA(2, steps=STEPS)), shiva_ext.enable(model, tiny.make_artifact(0.6)):
        run(model, calls)
    assert [len(each.given) for each in inner] == [3, 3]


@torch.no_grad()
def test_autocast():
    model = tiny.make_model()
    calls = calls_of("sd3", model, batch=3, paces=[0.02, 0.4, 1.5])
    for cache in (FORA(2, steps=STEPS), TeaCache(0.6, "identity", steps=STEPS)):
        with shiva_ext.enable(model, cache), torch.autocast("cpu", torch.bfloat16):
            assert all(each.isfinite().all() for each in run(model, calls))


@torch.no_grad()
def test_records_beside_a_cache_say_whose_tokens_they_are():
    model = tiny.make_model()
    calls = calls_of("sd3", model, batch=3, paces=[0.02, 0.4, 1.5])
    with (
        shiva_ext.enable(model, tiny.make_artifact(0.6)) as handle,
        shiva_ext.enable(model, TeaCache(0.6, "identity", steps=STEPS)),
    ):
        seen = Forwards(model.transformer_blocks[1].ff)
        handle.record()
        run(model, calls)
        model.transformer_blocks[1].ff.forward = seen.forward
    records = handle.records
    assert all(set(record) <= {"timestep", "kept", "sites", "rows"} for record in records)
    assert len(records) == STEPS
    assert "rows" not in records[0] and len(records[0]["kept"][1]) == 3
    partial = [record for record in records if record["kept"] and "rows" in record]
    assert partial and all(len(record["rows"]) == len(record["kept"][1]) < 3 for record in partial)
    assert sum(bool(record["kept"]) for record in records) == len(seen.given)


@torch.no_grad()
def test_more_calls_of_a_step_than_guidance_makes_are_refused():
    model = tiny.make_model()
    call = tiny.make_inputs()
    for cache in (FORA(2, steps=3), TeaCache(0.1, "identity", steps=3)):
        with shiva_ext.enable(model, cache) as handle:
            with pytest.raises(RuntimeError, match=r"more than 16 calls of one step.*handle.reset\(\)"):
                for _ in range(99):
                    model(**call)
            for _ in range(20):
                handle.reset()
                model(**call)
            one = handle.bytes
            handle.reset()
            model(**call)
            assert handle.bytes == one


# ----------------------------------------------------------------------------------------- compilers, exports, training


@torch.no_grad()
def test_one_graph_a_pattern_beside_a_selection():
    torch._dynamo.reset()
    pipe = flux_pipe(num_layers=1, num_single_layers=1)
    inputs = flux_inputs(true_cfg=False, steps=4)

    def call():
        return pipe(**inputs | dict(generator=torch.Generator().manual_seed(0)))[0]

    shiva_ext.enable(pipe, replace(EVERY["flux"][2](pipe.transformer), table=RatioTable.fixed(0.5, 2)))
    shiva_ext.enable(pipe, FORA(2))  # computes, reuses, computes, computes
    eager, counter = call(), CompileCounter()
    pipe.transformer = torch.compile(pipe.transformer, backend=counter, fullgraph=True)
    found = [call()]
    graphs = counter.frame_count
    found.append(call())
    # Two patterns; and at the first step no token has anything from before.
    assert graphs == counter.frame_count == 3
    for each in found:
        torch.testing.assert_close(each, eager, rtol=1e-4, atol=1e-5)


def test_an_export_beside_a_cache_is_refused():
    pipe = sd3_pipe()
    handle = shiva_ext.enable(pipe, tiny.make_artifact())
    with shiva_ext.enable(pipe, FORA(2)), pytest.raises(RuntimeError, match="cache takes from earlier ones"):
        with handle.at(0.7).exportable():
            pass
    with handle.at(0.7).exportable() as transformer:
        assert transformer is pipe.transformer


def test_training_a_cached_model_is_refused():
    model = tiny.make_model()
    handle = shiva_ext.enable(model, FORA(2, steps=3))
    before = tiny.snapshot(model)
    with pytest.raises(RuntimeError, match="has a cache, which takes from earlier steps"):
        ShivaTrainer(model, TrainConfig(), lambda size, generator: None)
    tiny.assert_unchanged(model, before)
    handle.disable()


def test_merging_at_modules_beside_fora_in_both_orders():
    results = []
    for order in ((0, 1), (1, 0)):
        pipe = sd3_pipe()
        for i in order:
            shiva_ext.enable(pipe, (ToMeSD(0.5), FORA(2))[i])
        results.append(pipe(**tiny.pipeline_inputs(2, 5))[0])
    assert torch.equal(*results)
