"""The report: what it caches, what it computes, and what it refuses; on a small untrained model."""

import json
import math
from io import StringIO

import pytest
import torch
from PIL import Image
from rich.console import Console

import shiva_ext
from shiva_ext import ShivaArtifact
from shiva_ext.evaluation.flops import sd3_forward_flops
from shiva_ext.methods import DiffCR, DyDiT
from shiva_ext.models import adapter_for
from shiva_ext.selection import RatioTable, RouterConfig, ShivaRouter
from shiva_ext.testbed import report as report_module
from shiva_ext.testbed import rows
from shiva_ext.testbed.figures import print_table, to_sheet
from shiva_ext.testbed.model import PROMPT_TOKENS, load_model
from shiva_ext.testbed.report import Study, fingerprint, report, sweep_guidance
from shiva_ext.testbed.rows import METHODS, ROWS, Row

SAMPLES, STEPS, KEPT = 10, 2, 128


class FirstTokens:
    """Stands in for a method: the last block updates the first half of the tokens only."""

    router_width, measured = 8, False

    def __init__(self, transformer, row, guided):
        self.transformer, self.recording, self.calls = transformer, False, []
        self.hook = transformer.transformer_blocks[1].register_forward_hook(self.forward, with_kwargs=True)

    def forward(self, block, args, kwargs, output):
        text, image = output
        if self.recording:
            self.calls.append({1: torch.arange(KEPT).expand(len(image), -1)})
        return text, torch.cat([image[:, :KEPT], kwargs["hidden_states"][:, KEPT:]], 1)

    def record(self, on):
        self.recording, self.calls = on, []

    def kept_tokens(self):
        return self.calls

    def work(self, dim, tokens):
        return [({layer: index.shape[1] for layer, index in call.items()}, 0) for call in self.calls]

    def disable(self):
        self.hook.remove()


@pytest.fixture
def half(monkeypatch):
    monkeypatch.setitem(METHODS, "half", FirstTokens)
    return Row("half the tokens", "half", ratio=0.5, steps=STEPS, group="other")


@pytest.fixture
def run(model_dir, tmp_path):
    def run(rows, **settings):
        common = dict(samples=SAMPLES, seeds=2, model_dir=model_dir, batch_size=5, timing_repeats=1, steps=STEPS)
        settings = common | settings
        return report(cache_dir=tmp_path / "cache", out_dir=tmp_path / "results", rows=rows, **settings)

    return run


DENSE = Row("dense", steps=STEPS, repeat=True)


def test_report_writes_table_plot_and_every_column(run, half, tmp_path, capsys):
    content = run([DENSE, half, Row("fewer steps", equal_time_as=half.name, steps=STEPS)])
    assert json.loads((tmp_path / "results" / "testbed.json").read_text()) == content
    assert Image.open(tmp_path / "results" / "testbed.png").size[0] > 500
    dense, pruned, fewer = content["rows"]
    assert "half the tokens" in capsys.readouterr().out
    assert len(dense["fid_seeds"]) == 2 and dense["fid_sd"] > 0
    assert len(pruned["fid_seeds"]) == 1 and pruned["fid_sd"] is None
    assert dense["psnr"] is None and 0 < pruned["psnr"] < 100
    assert dense["foreground_recall"] == dense["kept_share"] == 1 and pruned["kept_share"] == 0.5
    assert 0 < pruned["foreground_recall"] < 1
    assert pruned["seconds"] > 0 and pruned["speed_up"] > 0
    assert fewer["steps"] == max(1, round(STEPS / pruned["speed_up"]))
    for line in content["rows"]:
        assert 0 <= line["accuracy"] <= 1 and 0 <= line["precision"] <= 1 and 0 <= line["recall"] <= 1


def test_operations_are_those_of_the_kept_tokens_both_passes_and_all_steps(run, half, model_dir):
    dense, pruned = run([DENSE, half])["rows"]
    transformer, _ = load_model(model_dir)
    expected = sd3_forward_flops(transformer, PROMPT_TOKENS, 256)
    assert dense["gflops"] == pytest.approx(2 * STEPS * expected / 1e9)
    expected = sd3_forward_flops(transformer, PROMPT_TOKENS, 256, kept={1: KEPT}, router_width=8)
    assert pruned["gflops"] == pytest.approx(2 * STEPS * expected / 1e9)


@pytest.mark.parametrize(
    ("settings", "weights", "share"),
    [
        (DiffCR(), dict(keep=0.5, bias=100.0), 0.5),  # half of the tokens at every level
        (DyDiT(groups=8), dict(heads__bias=-50.0, channels__bias=-50.0, up__bias=-50.0), None),
    ],
)
def test_operations_of_a_trained_method_are_counted_as_it_runs(
    run, model_dir, tmp_path, monkeypatch, settings, weights, share
):
    transformer, _ = load_model(model_dir)
    tensors = settings.build(adapter_for(transformer), transformer).state_dict()
    for end, value in weights.items():
        for name in [name for name in tensors if name.endswith(end.replace("__", "."))]:
            tensors[name] = torch.full_like(tensors[name], value)
    monkeypatch.setattr(rows, "ASSETS", tmp_path)
    shiva_ext.MethodArtifact("SD3Transformer2DModel", settings, tensors).save(tmp_path / "trained")
    dense, line = run([DENSE, Row("trained", "artefact of a method", "trained", steps=STEPS)])["rows"]
    N, D = 256, transformer.inner_dim
    if share is None:  # a head and no MLP of the image's tokens: its own count, and what only the text does
        assert line["kept_share"] is None and line["foreground_recall"] is None
        saved = transformer.config.num_layers * 16 * N * D * D  # the MLPs, and a little of the attention
        assert saved * STEPS * 2 < (dense["gflops"] - line["gflops"]) * 1e9
    else:
        config = dict.fromkeys(range(transformer.config.num_layers), 128)
        routers = transformer.config.num_layers * 2 * N * D
        expected = sd3_forward_flops(transformer, PROMPT_TOKENS, N, kept=config) + routers
        # The embeddings of step and prompt are computed twice, for the model and for the method.
        assert line["gflops"] == pytest.approx(expected * STEPS * 2 / 1e9, rel=2e-3) and line["kept_share"] == 0.5


def test_finished_rows_are_never_computed_again(run, half, monkeypatch):
    first = run([DENSE, half])
    monkeypatch.setattr(report_module, "generate", lambda *_, **__: pytest.fail("a finished row was computed again"))
    assert run([DENSE, half]) == first


def test_an_interrupted_report_goes_on_at_the_row(run, half, monkeypatch):
    def interrupted(transformer, row, guided):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "half", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run([DENSE, half])
    done = []
    original = Study._setup

    def setup(study, row):
        done.append(row.name)
        return original(study, row)

    monkeypatch.setattr(Study, "_setup", setup)
    run([DENSE, half])
    assert done.count("half the tokens") == 2  # once to sample, once to time
    assert done.count("dense") == 1  # only as the partner of that timing


def test_rows_are_timed_in_turns_each_behind_a_dense_batch(tmp_path, model_dir, monkeypatch):
    study = Study(tmp_path, SAMPLES, 1, model_dir, batch_size=2, timing_repeats=2, steps=STEPS)
    rows = [Row(f"{steps} steps", steps=steps) for steps in (1, 2, 3)]
    done, original = [], Study._generate

    def generate(study, transformer, prompts, labels, noise, row):
        done.append(row.name)
        return original(study, transformer, prompts, labels, noise, row)

    monkeypatch.setattr(Study, "_generate", generate)
    study.timing(rows[2])
    assert done == 3 * ["dense", "3 steps"]  # the first turn is not counted
    done.clear()
    found = study.timings(rows)
    assert done == 3 * ["dense", "1 steps", "dense", "2 steps"]
    assert [each["name"] for each in found] == [row.name for row in rows]
    for each in found:
        assert len(each["pairs"]) == 2
        assert each["speed_up"] == pytest.approx(sum(dense / mine for dense, mine in each["pairs"]) / 2)
    done.clear()
    assert study.timings(rows) == found and not done
    assert study.timings(rows, again=True) != found
    assert done == 3 * ["dense", "1 steps", "dense", "2 steps", "dense", "3 steps"]


def test_more_seeds_keep_those_that_are_done(run, monkeypatch):
    fid = run([DENSE], seeds=1)["rows"][0]["fid_seeds"]
    assert run([DENSE], seeds=2)["rows"][0]["fid_seeds"][:1] == fid


def test_every_setting_that_matters_changes_the_cache_key(model_dir, tmp_path, half):
    def key(row=half, seed=0, **settings):
        return Study(tmp_path, model_dir=model_dir, **settings)._file(row, seed=seed)

    keys = {key(), key(seed=1), key(DENSE), key(samples=20), key(guidance=3.0), key(dtype=torch.float32)}
    keys |= {key(Row("half", "half", ratio=0.6, steps=STEPS)), key(Row("half", "half", ratio=0.5, steps=3))}
    assert len(keys) == 8
    renamed = Row("another name", "half", ratio=0.5, steps=STEPS, repeat=True, group="shiva")
    assert key(renamed) == key()


def test_a_retrained_artefact_is_another_artefact(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    (tmp_path / "config.json").write_text("{ }")
    assert fingerprint(tmp_path) != before


@pytest.mark.parametrize("source", ["random", "largest_norm"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_baselines_run_through_enable(run, source, guidance, model_dir):
    line = run([Row("baseline", "selector", source, 0.6, steps=STEPS)], guidance=guidance)["rows"][0]
    assert line["kept_share"] == 153 / 256
    transformer, _ = load_model(model_dir)
    passes = 2 if guidance > 1 else 1
    expected = passes * STEPS * sd3_forward_flops(transformer, PROMPT_TOKENS, 256, kept={1: 153})
    assert line["gflops"] == pytest.approx(expected / 1e9)


@pytest.mark.parametrize("method, share", [("artefact", 0.25), ("artefact at ratio", 0.5)])
def test_artefacts_run_through_enable(run, method, share, tmp_path):
    router = ShivaRouter.from_config(RouterConfig(dim=128, temb_dim=128, pooled_dim=128, num_layers=2))
    artefact = ShivaArtifact("SD3Transformer2DModel", router, RatioTable.fixed(0.25, 2, 1))
    artefact.save(tmp_path / "artefact")
    line = run([Row("artefact", method, str(tmp_path / "artefact"), 0.5, steps=STEPS)])["rows"][0]
    assert line["kept_share"] == pytest.approx(share)


def test_psnr_compares_with_dense_from_the_same_noise(run, half, tmp_path, model_dir):
    line = run([half])["rows"][0]
    study = Study(tmp_path / "cache", SAMPLES, 2, model_dir, batch_size=5, timing_repeats=1, steps=STEPS)
    images, reference = study.images(half, 0), study.images(study.dense, 0)
    error = (images.clamp(-1, 1) - reference.clamp(-1, 1)).square().flatten(1).mean(1)
    assert line["psnr"] == pytest.approx((10 * torch.log10(4 / error)).mean().item(), abs=1e-3)


def test_a_row_that_diverges_names_itself_and_leaves_nothing_behind(run, monkeypatch, tmp_path):
    class Diverging(FirstTokens):
        def forward(self, block, args, kwargs, output):
            return output[0], output[1] * math.nan

    monkeypatch.setitem(METHODS, "diverging", Diverging)
    with pytest.raises(ValueError, match="row 'broken', seed 0: the sampler has diverged"):
        run([DENSE, Row("broken", "diverging", steps=STEPS)])
    assert all(json.loads(file.read_text())["name"] == "dense" for file in (tmp_path / "cache").glob("*.json"))


def test_wrong_rows_are_refused_before_anything_is_computed(run, monkeypatch):
    monkeypatch.setattr(report_module, "generate", lambda *_, **__: pytest.fail("computed before checking"))
    with pytest.raises(ValueError, match="unknown row 'shiva'; the rows are 'dense', "):
        run(["dense", "shiva"])
    with pytest.raises(ValueError, match="row 'x': method must be one of dense, artefact, .*, got 'tome'"):
        run([DENSE, Row("x", "tome")])
    with pytest.raises(ValueError, match="needs the time of row 'gone', which is not in the report"):
        run([DENSE, Row("x", equal_time_as="gone")])
    with pytest.raises(FileNotFoundError, match="row 'x' needs the artefact .*missing"):
        run([DENSE, Row("x", "artefact", "missing")])
    with pytest.raises(ValueError, match="source must be one of random, largest_norm, got 'first'"):
        METHODS["selector"](None, Row("x", "selector", "first"), True)


def test_guidance_sweep_measures_dense_at_each_scale(model_dir, tmp_path):
    results = sweep_guidance((1.0, 3.0), SAMPLES, tmp_path, model_dir=model_dir, batch_size=5)
    assert list(results) == [1.0, 3.0]
    assert results[3.0]["gflops"] == pytest.approx(2 * results[1.0]["gflops"])
    assert results[3.0]["fid"] != results[1.0]["fid"]


def test_table_has_the_rows_of_the_comparison():
    assert [row.name for row in ROWS] == [
        "dense", "dense fine-tuned", "Shiva 80 %", "Shiva 60 %", "Shiva 60 %, one choice a pair", "fixed ratio 60 %",
        "random tokens 60 %", "largest-norm tokens 60 %", "fewer steps, time of Shiva 60 %",
    ]  # fmt: skip


def test_printed_table_shows_spread_and_missing_values():
    line = dict(name="dense", steps=20, fid=1.2345, fid_sd=0.04, accuracy=0.9, precision=0.8, recall=0.7, psnr=None)
    line |= dict(kept_share=0.6, foreground_recall=0.75, gflops=12.0, seconds=0.5, speed_up=1.5)
    output = StringIO()
    print_table([line, line | {"fid_sd": None}], Console(file=output, width=200))
    assert "1.23 ± 0.04" in output.getvalue() and "1.50×" in output.getvalue() and "–" in output.getvalue()


def test_sheet_places_images_row_by_row_and_clamps():
    images = torch.stack([torch.full((1, 2, 2), value) for value in (-3.0, 0.0, 3.0)])
    assert to_sheet(images, columns=2).tolist() == [[0, 0, 128, 128]] * 2 + [[255, 255, 0, 0]] * 2
