"""Calibration: what is recorded, what is fitted to it, the files, and ``shiva calibrate``."""

import json
import os
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from models import tiny
from models.every_family import EVERY
from models.test_families import dit_pipeline
from torch import nn
from training.tiny_pipeline import save_artifact, save_pipeline

import shiva_ext
from shiva_ext.caches import SmoothCache, TeaCache, load_cache, make_schedule, read_cache, save_cache
from shiva_ext.caches.calibrate import (
    TooFewRuns,
    calibrate_smoothcache,
    calibrate_teacache,
    fit_polynomial,
    reused_share,
)
from shiva_ext.cli import main
from shiva_ext.models import adapter_for
from shiva_ext.selection import RandomSelector, RatioTable
from shiva_ext.training.fit import load_pipeline

from .test_families_cached import STEPS, Forwards, calls_of, flux_inputs, flux_pipe, left_on, run, sd3_pipe

pytestmark = pytest.mark.usefixtures("one_thread")
every_family = pytest.mark.parametrize("name", EVERY)


# ------------------------------------------------------------------------------------------------------ the polynomial


@pytest.mark.parametrize("wanted", [(2.0, -1.0, 0.5, 0.3, 0.1), (0.5, 0.1), (3.0, 0.0, 0.2)])
def test_a_known_polynomial_is_found_again(wanted):
    x = np.linspace(0.05, 0.9, 40)
    pairs = list(zip(x, np.polyval(wanted, x), strict=True)) + [(float("nan"), 1.0), (0.5, float("inf"))]
    found, bounds, r2 = fit_polynomial(pairs, degree=len(wanted) - 1)
    assert found == pytest.approx(wanted, abs=1e-8) and bounds == pytest.approx((0.05, 0.9)) and r2 == pytest.approx(1)


def test_what_does_not_explain_anything_has_no_r2():
    random = np.random.default_rng(0)
    pairs = list(zip(random.random(500), random.random(500), strict=True))
    assert fit_polynomial(pairs)[2] < 0.05


@pytest.mark.parametrize("seed", range(20))
def test_it_is_not_negative_where_changes_were_seen(seed):
    random = np.random.default_rng(seed)
    x = random.random(12) ** 4
    y = np.abs(random.standard_normal(12)) * (random.random(12) < 0.3)  # mostly zero: high degrees swing below
    found, bounds, _ = fit_polynomial(list(zip(x, y, strict=True)))
    between = np.linspace(*bounds, 2000)
    assert np.polyval(found, between).min() >= -1e-3 * max(y.max(), 1e-9)
    cache = TeaCache(0.1, found, bounds)
    for outside in (-5.0, 0.0, 1e9):
        assert cache.expected(found, outside) >= -1e-3 * max(y.max(), 1e-9)


def test_a_polynomial_needs_more_different_changes_than_its_degree():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of numpy's, that the fit is poorly conditioned
        for pairs in ([], [(0.1, 0.1)] * 50, [(0.1, 0.1), (0.2, 0.3), (0.3, 0.1)] * 50, [(float("nan"), 1.0)] * 9):
            with pytest.raises(TooFewRuns, match="wanted more than 4"):
                fit_polynomial(pairs)
        assert len(fit_polynomial([(0.1, 0.1), (0.2, 0.3), (0.3, 0.1)] * 50, degree=2)[0]) == 3


# ------------------------------------------------------------------------------------------------------------ TeaCache


def l1(now, before):
    return ((now - before).abs().mean() / before.abs().mean()).item()


@every_family
def test_the_pairs_are_the_changes_of_entry_and_of_what_the_blocks_add(name):
    model, by_hand = EVERY[name][0](), EVERY[name][0]()
    calls = calls_of(name, model, batch=1)
    found = calibrate_teacache(model, lambda: run(model, calls), steps=STEPS, share=0.3, degree=1)
    adapter, seen = adapter_for(by_hand), {"m": [], "added": []}
    blocks = adapter.blocks(by_hand)

    def entry(module, args, kwargs):
        arguments = adapter.bind(module.forward, args, kwargs)
        seen["x"] = arguments["hidden_states"]
        seen["m"].append(adapter.modulated_input(module, seen["x"], arguments))

    blocks[0].register_forward_pre_hook(entry, with_kwargs=True)
    blocks[-1].register_forward_hook(lambda m, a, out: seen["added"].append(adapter.image_tokens(out) - seen["x"]))
    run(by_hand, calls)
    wanted = [(l1(seen["m"][i], seen["m"][i - 1]), l1(seen["added"][i], seen["added"][i - 1])) for i in range(1, STEPS)]
    assert np.allclose(found.pairs, wanted, atol=2e-6) and len(found.pairs) == STEPS - 1
    assert found.bounds == pytest.approx((min(x for x, _ in wanted), max(x for x, _ in wanted)), abs=1e-5)
    assert not left_on(model)


@every_family
@torch.no_grad()
def test_thresholds_lead_to_the_shares_they_promise(name):
    """On the runs of the calibration, whose indicators do not depend on what is reused."""
    model = EVERY[name][0]()
    runs = [calls_of(name, model, batch=2, seed=seed, paces=[0.05, 0.6]) for seed in range(3)]

    def all_runs():
        for calls in runs:
            run(model, calls)

    found = calibrate_teacache(model, all_runs, steps=STEPS, share=0.4, degree=1)
    assert set(found.thresholds) >= {0.2, 0.3, 0.4, 0.5, 0.6} and found.threshold == found.thresholds[0.4]
    assert list(found.thresholds.values()) == sorted(found.thresholds.values())
    sequences = [[x for x, _ in found.pairs[i : i + STEPS - 1]] for i in range(0, len(found.pairs), STEPS - 1)]
    for share, threshold in found.thresholds.items():
        cache = replace(found.cache(threshold), steps=STEPS)
        reused = calls = 0
        with shiva_ext.enable(model, cache) as handle:
            for own in runs:
                run(model, own)
                handle.reset()
                reused, calls = reused + handle.state.last[1], calls + sum(handle.state.last)
        assert reused / calls >= share - 1e-9
        assert (
            abs(reused / calls - reused_share(cache, found.coefficients, sequences, STEPS)) < 0.1
        )  # pairs are rounded
        less = TeaCache(threshold * 0.98, found.coefficients, found.bounds)
        assert reused_share(less, found.coefficients, sequences, STEPS) <= reused / calls


def test_shares_by_hand():
    cache = TeaCache(0.5, (1.0, 0.0))
    # Steps 1 to 4 of 6: 0.2; 0.4; 0.6 computes; 0.3; the last computes.
    assert reused_share(cache, (1.0, 0.0), [[0.2, 0.2, 0.2, 0.3, 0.1]], 6) == 3 / 6
    assert reused_share(TeaCache(0.0, (1.0, 0.0)), (1.0, 0.0), [[0.2] * 5], 6) == 0
    assert reused_share(TeaCache(9.0, (1.0, 0.0)), (1.0, 0.0), [[0.2] * 5, [float("nan")] * 5], 6) == 4 / 12


def test_guidance_counts_an_image_once_in_one_call_and_twice_in_two():
    pipe = sd3_pipe()
    found = calibrate_teacache(pipe, lambda: pipe(**tiny.pipeline_inputs(3, 8)), share=0.3)
    assert len(found.pairs) == 3 * 7 and found.fit.steps == 8
    flux = flux_pipe()
    found = calibrate_teacache(flux, lambda: flux(**flux_inputs(true_cfg=True)), share=0.3, degree=1)
    assert len(found.pairs) == 2 * 5


def dit_runs(scheduler):
    torch.manual_seed(0)
    pipe, inputs = dit_pipeline(EVERY["dit"][0](num_embeds_ada_norm=1000))
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    return pipe, lambda: pipe(**inputs, num_inference_steps=8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_with_schedulers_that_do_not_number_their_steps(scheduler):
    pipe, once = dit_runs(scheduler())
    found = calibrate_teacache(pipe, once, share=0.3, batched_guidance=True)
    assert len(found.pairs) == 2 * 7
    smooth = calibrate_smoothcache(pipe, once, share=0.6, batched_guidance=True)
    assert {len(row) for rows in smooth.errors.values() for row in rows.values()} == {7, 6, 5}
    assert sum(map(sum, smooth.cache().schedules.values())) <= 0.6 * 16


def test_what_is_not_finite_does_not_decide():
    model = tiny.make_model()
    calls = calls_of("sd3", model, batch=1)
    broken = [dict(call) for call in calls]
    broken[2]["hidden_states"] = torch.full_like(broken[2]["hidden_states"], float("nan"))
    found = calibrate_teacache(
        model, lambda: [run(model, own) for own in (broken, calls)], steps=STEPS, share=0.3, degree=1
    )
    assert all(map(np.isfinite, [*found.coefficients, *found.thresholds.values(), found.threshold]))
    smooth = calibrate_smoothcache(
        model, lambda: [run(model, own) for own in (broken, calls)], steps=STEPS, share=0.9, max_lag=1
    )
    assert np.isfinite(smooth.alpha) and smooth.cache().schedules["mlp"][2] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(share=0.0), "share is 0.0"),
        (dict(share=1.0), "share is 1.0"),
        (dict(share=0.9), "can reuse 60% of the calls"),
    ],
)
def test_shares_out_of_range_or_reach(settings, message):
    model = tiny.make_model()
    calls = calls_of("sd3", model)
    with pytest.raises(ValueError, match=message):
        calibrate_teacache(model, lambda: run(model, calls), steps=STEPS, degree=1, **settings)
    assert not left_on(model)


def test_runs_that_are_none_or_of_other_lengths_are_refused():
    pipe = sd3_pipe()

    def other_lengths():
        for steps in (4, 6):
            pipe(**tiny.pipeline_inputs(1, steps))

    for calibrate, options in ((calibrate_teacache, dict(share=0.2)), (calibrate_smoothcache, dict(alpha=0.1))):
        with pytest.raises(ValueError, match="runs of 4 and of 6 steps"):
            calibrate(pipe, other_lengths, **options)
        with pytest.raises(TooFewRuns):
            calibrate(pipe, lambda: None, **options)
        with pytest.raises(TooFewRuns):
            calibrate(pipe, lambda: pipe(**tiny.pipeline_inputs(1, 1)), **options)
    image = tiny.make_img2img(tiny.make_model())

    def in_the_middle():
        inputs = tiny.pipeline_inputs(1, 8)
        inputs.pop("height"), inputs.pop("width")
        image(image=torch.rand(1, 3, 8, 8), strength=0.5, **inputs)

    with pytest.raises(TooFewRuns, match="no run had all of its 8 steps"):
        calibrate_smoothcache(image, in_the_middle, alpha=0.1)
    assert not left_on(pipe.transformer) and "step" not in vars(pipe.scheduler)


# --------------------------------------------------------------------------------------------------------- SmoothCache


def image_of(output) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def mean_error(now, before) -> float:
    """Per sample, then their mean."""
    return ((before - now).abs().flatten(1).sum(1) / now.abs().flatten(1).sum(1)).mean().item()


@every_family
def test_errors_are_those_of_captured_outputs(name):
    model, captured = EVERY[name][0](), EVERY[name][0]()
    runs = [calls_of(name, model, seed=seed) for seed in range(2)]
    sites = [(kind, Forwards(m)) for block in adapter_for(captured).blocks(captured)
             for kind, ms in adapter_for(captured).cache_sites(block).items()
             for m, parts in ms if parts[0] != "text"]  # fmt: skip
    for calls in runs:
        run(captured, calls)
    found = calibrate_smoothcache(
        model, lambda: [run(model, calls) for calls in runs], alpha=0.3, steps=STEPS, max_lag=2
    )
    assert set(found.errors) == {kind for kind, _ in sites} and found.alpha == 0.3
    for kind, rows in found.errors.items():
        assert set(rows) == {1, 2}
        for lag, row in rows.items():
            for i in range(STEPS - lag):
                wanted = [
                    mean_error(*(image_of(site.given[r * STEPS + step]) for step in (i + lag, i)))
                    for k, site in sites if k == kind for r in range(len(runs))
                ]  # fmt: skip
                assert row[i] == pytest.approx(np.mean(wanted), abs=2e-6)
        assert found.cache().schedules[kind] == make_schedule(rows, 0.3, STEPS)
    for alpha in (0.0, 0.5, 99.0):
        assert found.cache(alpha).schedules == {
            k: make_schedule(rows, alpha, STEPS) for k, rows in found.errors.items()
        }
    assert not left_on(model)


@pytest.mark.parametrize("name", ["sd3", "flux", "sana"])
@torch.no_grad()
def test_beside_a_selection_errors_are_of_what_the_tokens_would_be_given(name):
    """Which is what each got when it was computed last, k steps ago or before, and nothing if it never was."""
    model = EVERY[name][0]()
    layers = len(adapter_for(model).blocks(model))
    calls = calls_of(name, model, batch=1)
    inner = [
        (Forwards(adapter_for(model).cache_sites(block)["mlp"][0][0]), layer)
        for layer, block in enumerate(adapter_for(model).blocks(model))
        if name != "flux" or layer < 2
    ]
    table = RatioTable.fixed(0.5, layers)
    with shiva_ext.enable(model, replace(EVERY[name][2](model), table=table), fused=False) as handle:
        handle.record()
        found = calibrate_smoothcache(model, lambda: run(model, calls), alpha=0.3, steps=STEPS, max_lag=2)
        records = handle.records
    if name == "flux":  # in one stream the text counts, too: only the shapes and signs are looked at
        assert all(0 < error for rows in found.errors.values() for row in rows.values() for error in row)
        return
    N = {"sd3": 16, "sana": 24}[name]
    for lag, row in found.errors["mlp"].items():
        for i in range(STEPS - lag):
            errors = []
            for forwards, layer in inner:
                last = None
                for step in range(i + lag + 1):
                    now = forwards.given[step]
                    now = now.flatten(2).transpose(1, 2) if name == "sana" else now
                    kept = records[step]["kept"].get(layer, torch.arange(N)[None])[0]
                    last = torch.zeros(1, N, now.shape[2]) if last is None else last
                    if step == i + lag:
                        errors.append(mean_error(now, last[:, kept]))
                    if step <= i:
                        last[:, kept] = now
            assert row[i] == pytest.approx(np.mean(errors), abs=2e-6)


def test_a_share_is_met_by_the_least_alpha_and_a_larger_lag_reaches_further():
    pipe = sd3_pipe()

    def once():
        pipe(**tiny.pipeline_inputs(2, 8))

    found = calibrate_smoothcache(pipe, once, share=0.6)
    assert found.cache().computed_share <= 0.6
    smaller = sorted({e for rows in found.errors.values() for row in rows.values() for e in row if e < found.alpha})
    assert all(found.cache(alpha).computed_share > 0.6 for alpha in smaller)
    with pytest.raises(ValueError, match="no fewer than 62% can be computed"):
        calibrate_smoothcache(pipe, once, share=0.3, max_lag=1)
    # The last step computes, too; a lag of 3 leaves out three of four.
    assert calibrate_smoothcache(pipe, once, share=0.4, max_lag=3).cache().computed_share <= 0.4


class Still(nn.Module):
    """Gives nothing at all."""

    def forward(self, hidden_states):
        return torch.zeros_like(hidden_states)


def test_modules_that_give_nothing_have_no_error():
    model = tiny.make_model()
    for block in model.transformer_blocks:
        block.ff = Still()
    found = calibrate_smoothcache(model, lambda: run(model, calls_of("sd3", model)), alpha=0.0, steps=STEPS)
    assert set(found.errors["mlp"][1]) == {0.0} and found.cache().schedules["mlp"] == (1, 0, 0, 0, 1)


@pytest.mark.parametrize(
    "settings", [{}, dict(alpha=0.1, share=0.5), dict(share=0.0), dict(share=1.5), dict(alpha=0.1, max_lag=0)]
)
def test_settings_of_smoothcache_that_make_no_sense(settings):
    with pytest.raises(ValueError, match="wanted one of alpha"):
        calibrate_smoothcache(tiny.make_model(), lambda: None, steps=STEPS, **settings)


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def found():
    pipe = sd3_pipe()

    def once():
        pipe(**tiny.pipeline_inputs(2, 8))

    return {
        "teacache": calibrate_teacache(pipe, once, share=0.4),
        "smoothcache": calibrate_smoothcache(pipe, once, share=0.6),
    }


KINDS = ("teacache", "smoothcache")


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_enough_for_a_transformer_without_a_pipeline(kind, found, tmp_path):
    save_cache(found[kind], tmp_path / "cache.json")
    model = tiny.make_model()
    with shiva_ext.enable(model, tmp_path / "cache.json") as handle:
        for step in range(8):
            model(**tiny.make_inputs(1, sigma=0.95 - 0.1 * step))
        handle.reset()
        computed, reused = handle.state.last
    assert computed + reused == 8 and reused > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_gives_back_what_was_found(kind, found, tmp_path):
    file = tmp_path / "deep" / "cache.json"
    save_cache(found[kind], file)
    assert read_cache(file) == found[kind] and load_cache(file) == found[kind].cache()
    assert [each.name for each in file.parent.iterdir()] == ["cache.json"]
    pipe = sd3_pipe()
    for source in (str(file), file, found[kind].cache()):
        shiva_ext.enable(pipe, source)
        first = pipe(**tiny.pipeline_inputs(2, 8))[0]
        shiva_ext.disable(pipe)
        shiva_ext.enable(pipe, load_cache(file))
        assert torch.equal(pipe(**tiny.pipeline_inputs(2, 8))[0], first)
        shiva_ext.disable(pipe)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_written_whole_or_not_at_all(kind, found, tmp_path, monkeypatch):
    file = tmp_path / "cache.json"
    save_cache(found[kind], file)
    before = file.read_bytes()

    def break_off(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", break_off)
    with pytest.raises(OSError, match="no space left"):
        save_cache(replace(found[kind], fit=replace(found[kind].fit, steps=9)), file)
    assert file.read_bytes() == before


def changed(content: dict, place: str, value) -> dict:
    content = json.loads(json.dumps(content))
    inner = content
    *path, last = place.split(".")
    for name in path:
        inner = inner[name]
    if value is KeyError:
        del inner[last]
    else:
        inner[last] = value
    return content


@pytest.mark.parametrize(
    ("kind", "place", "value"),
    [
        ("teacache", "format", 99), ("teacache", "format", "new"), ("teacache", "format", KeyError),
        ("teacache", "cache", "deepcache"), ("teacache", "fit", None), ("teacache", "fit", KeyError),
        ("teacache", "fit.steps", KeyError), ("teacache", "fit.more", 1), ("teacache", "coefficients", "many"),
        ("teacache", "coefficients", []), ("teacache", "bounds", [0.1]), ("teacache", "bounds", None),
        ("teacache", "threshold", -1), ("teacache", "threshold", "low"), ("teacache", "thresholds", [1, 2]),
        ("smoothcache", "errors", []), ("smoothcache", "errors", {"mlp": [0.1]}), ("smoothcache", "errors", {}),
        ("smoothcache", "errors", {"mlp": {"one": [0.1]}}), ("smoothcache", "errors", {"mlp": {"1": [0.1] * 99}}),
        ("smoothcache", "alpha", None), ("smoothcache", "alpha", -1), ("smoothcache", "between", KeyError),
        ("smoothcache", "fit.steps", "many"),
    ],
)  # fmt: skip
def test_files_that_hold_something_else_are_named(kind, place, value, found, tmp_path):
    file = tmp_path / "cache.json"
    save_cache(found[kind], file)
    file.write_text(json.dumps(changed(json.loads(file.read_text()), place, value)))
    pipe = sd3_pipe()
    before = tiny.snapshot(pipe.transformer)
    with pytest.raises(ValueError, match=r"cache\.json is no calibration of a cache: ."):
        shiva_ext.enable(pipe, file)
    tiny.assert_unchanged(pipe.transformer, before)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", '"teacache"', "\x00\xff", "{}"])
def test_files_that_are_no_calibration_are_named(text, tmp_path):
    file = tmp_path / "cache.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"cache\.json is no calibration of a cache: ."):
        read_cache(file)
    with pytest.raises(FileNotFoundError, match=r"no .*elsewhere\.json; `shiva calibrate` writes one"):
        shiva_ext.enable(sd3_pipe(), tmp_path / "elsewhere.json")


@pytest.mark.parametrize("kind", KINDS)
def test_another_model_weights_scheduler_or_steps(kind, found):
    cache = found[kind].cache()
    with pytest.raises(ValueError, match="calibrated for a SD3Transformer2DModel, got a FluxTransformer2DModel"):
        shiva_ext.enable(flux_pipe(), cache)
    with pytest.raises(ValueError, match="of another configuration"):
        shiva_ext.enable(sd3_pipe(tiny.make_model(num_layers=3)), cache)
    with pytest.raises(ValueError, match="with other weights; calibrate it for this checkpoint"):
        shiva_ext.enable(sd3_pipe(tiny.make_model(seed=1)), cache)
    for other in (FlowMatchEulerDiscreteScheduler(shift=3.0), DPMSolverMultistepScheduler()):
        with pytest.raises(ValueError, match=r"a scheduler whose (class|shift|\w+) is"):
            shiva_ext.enable(sd3_pipe(scheduler=other), cache)
    pipe = sd3_pipe()
    before = tiny.snapshot(pipe.transformer)
    with shiva_ext.enable(pipe, cache):
        wanted = pipe(**tiny.pipeline_inputs(2, 8))[0]
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        with pytest.raises(ValueError, match="a scheduler whose shift is 1.0, this one's is 3.0"):
            pipe(**tiny.pipeline_inputs(2, 8))
        pipe.scheduler = FlowMatchEulerDiscreteScheduler()
        assert torch.equal(pipe(**tiny.pipeline_inputs(2, 8))[0], wanted)
        if kind == "smoothcache":
            with pytest.raises(ValueError, match="schedules of 8 steps, got a run of 7"):
                pipe(**tiny.pipeline_inputs(2, 7))
        else:
            with pytest.warns(UserWarning, match="calibrated with runs of 8 steps, this one has 7"):
                pipe(**tiny.pipeline_inputs(2, 7))
    tiny.assert_unchanged(pipe.transformer, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_the_same_model_in_fewer_bits_is_the_same_model(kind, dtype, found):
    model = tiny.make_model()
    if dtype.itemsize == 1:
        model.enable_layerwise_casting(storage_dtype=dtype, compute_dtype=torch.float32, skip_modules_pattern=())
        assert any(p.dtype == dtype for p in model.parameters())
    else:
        model.to(dtype)
    shiva_ext.enable(sd3_pipe(model), found[kind].cache()).disable()


# -------------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_pipeline(folder)
    save_artifact(folder)
    (folder / "prompts.txt").write_text("a shirt\na shoe\n")
    return folder


def call(folder, kind: str, *extra, steps: int = 7) -> int:
    common = ["--model", str(folder / "model"), "--out", str(folder / f"{kind}.json"), "--size", "16", "--samples", "2"]
    common += ["--steps", str(steps), "--dtype", "float32", "--device", "cpu", "--prompts", str(folder / "prompts.txt")]
    return main(["calibrate", kind, *common, *extra])


def pipeline_run(pipe, steps: int = 7):
    return pipe(
        "a shirt", num_inference_steps=steps, height=16, width=16, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip


@pytest.mark.parametrize("beside", [False, True])
def test_the_command_line_writes_a_file_that_can_be_enabled(folder, capsys, beside):
    selection = ["--artefact", str(folder / "artefact")] if beside else []
    assert call(folder, "teacache", "--share", "0.4", *selection) == 0
    printed = capsys.readouterr().out
    assert "R2" in printed and "40% at" in printed and "teacache.json" in printed
    assert call(folder, "smoothcache", "--share", "0.6", "--max-lag", "2", *selection) == 0
    printed = capsys.readouterr().out
    assert "alpha" in printed and "attention" in printed and "mlp" in printed
    pipe = load_pipeline(str(folder / "model"), None, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    dense = pipeline_run(pipe)
    if beside:
        shiva_ext.enable(pipe, str(folder / "artefact"))
    for kind, cls in (("teacache", TeaCache), ("smoothcache", SmoothCache)):
        handle = shiva_ext.enable(pipe, str(folder / f"{kind}.json"))
        assert isinstance(handle.cache, cls) and handle.cache.fit.steps == 7
        assert handle.cache.fit.scheduler["class"] == "FlowMatchEulerDiscreteScheduler"
        assert pipeline_run(pipe).isfinite().all()
    shiva_ext.disable(pipe)
    assert torch.equal(pipeline_run(pipe), dense)
    content = json.loads((folder / "smoothcache.json").read_text())
    assert max(map(int, content["errors"]["mlp"])) == 2
    for name, schedule in content["schedules"].items():
        rows = {int(k): row for k, row in content["errors"][name].items()}
        assert tuple(schedule) == make_schedule(rows, content["alpha"], 7)


@pytest.mark.parametrize(
    ("kind", "extra", "message"),
    [
        ("teacache", ("--share", "1.5"), "share is 1.5"), ("teacache", ("--steps", "1"), "steps 1"),
        ("teacache", ("--samples", "0"), "samples is 0"), ("teacache", ("--dtype", "int3"), "dtype is 'int3'"),
        ("teacache", ("--out", "cache.txt"), "wanted a file ending in .json"),
        ("smoothcache", (), "wanted one of alpha"),
        ("smoothcache", ("--alpha", "1", "--share", "0.5"), "wanted one of alpha"),
        ("smoothcache", ("--share", "0.01"), "can be computed"),
        ("teacache", ("--model", "emoji"), "are not for the testbed 'emoji'"),
        ("teacache", ("--artefact", "/no/such/folder"), "/no/such/folder"),
        ("teacache", ("--prompts", "/no/such/file"), "/no/such/file"),
    ],
)  # fmt: skip
def test_errors_of_the_command_line_are_one_line(kind, extra, message, folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = {each.name: each.read_bytes() for each in folder.glob("*.json")}
    assert call(folder, kind, *extra, steps=4) == 1
    captured = capsys.readouterr().err
    last = captured.strip().splitlines()[-1]
    assert last.startswith("shiva: ") and message in last and "Traceback" not in captured
    assert {each.name: each.read_bytes() for each in folder.glob("*.json")} == before


def test_a_selector_of_ones_own_beside_a_calibration():
    pipe = sd3_pipe()
    with shiva_ext.enable(pipe, RandomSelector(0.5)):
        found = calibrate_smoothcache(pipe, lambda: pipe(**tiny.pipeline_inputs(2, 6)), share=0.6)
        with shiva_ext.enable(pipe, found.cache()):
            assert pipe(**tiny.pipeline_inputs(2, 6))[0].isfinite().all()
