"""The planner: its choice on synthetic trials, and a search on a tiny pipeline from the command line to enable."""

import json

import pytest
import torch
from training.tiny_pipeline import save_artifact, save_pipeline

import shiva_ext
from shiva_ext.bench import tune
from shiva_ext.bench.tune import Trial, candidates, cell_of, choose
from shiva_ext.caches import FORA, GuidanceCache
from shiva_ext.cli import main
from shiva_ext.training.fit import load_pipeline

STEPS = 6


def trial(name: str, speed_up: float, fidelity: float, **axes) -> Trial:
    cell = cell_of(axes.pop("steps", STEPS), **axes)
    return Trial(cell.__class__(name, *list(vars(cell).values())[1:]), speed_up, fidelity)


FAST, GOOD, BEST = trial("fast", 4.0, 0.7), trial("good", 2.5, 0.85), trial("best", 1.5, 0.97)


@pytest.mark.parametrize(
    ("budget", "bound", "wanted"),
    [
        (None, 0.8, "good"),
        (None, 0.9, "best"),
        (None, 0.5, "fast"),
        (1.4, 0.5, "best"),
        (2.0, 0.5, "good"),
        (3, 0.5, "fast"),
    ],
)
def test_the_fastest_within_the_bound_or_the_best_at_the_budget(budget, bound, wanted):
    assert choose([FAST, GOOD, BEST], budget, bound).cell.name == wanted


@pytest.mark.parametrize(("budget", "bound"), [(None, 0.99), (5.0, 0.5), (2.0, 0.9)])
def test_where_nothing_reaches_both_the_nearest_are_named(budget, bound):
    with pytest.raises(ValueError, match=r"nothing that was measured .* best \(1.50x, SSIM 0.970\)"):
        choose([FAST, GOOD, BEST], budget, bound)


def test_combinations_take_one_of_each_axis_and_the_most_promising_come_first():
    tokens = [trial("a", 1.2, 0.99, budget=0.8), trial("b", 1.6, 0.9, budget=0.5)]
    caches = [trial("c", 1.5, 0.95, cache=("fora", 2)), trial("d", 2.5, 0.6, cache=("fora", 3))]
    found = candidates({"selection": tokens, "cache": caches, "steps": []}, budget=2.0)
    names = [[each.cell.name for each in some] for some in found]
    assert sorted(names) == [["a", "c"], ["a", "d"], ["b", "c"], ["b", "d"]]
    assert names[0] == ["b", "c"]  # 2.4x for a loss of .15; a with c is too slow, the others lose more


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    save_pipeline(folder)
    save_artifact(folder)
    return folder


@pytest.fixture(scope="module")
def command(folder):
    given = dict(
        model=folder / "model", artefact=folder / "artefact", out=folder / "tuned.json", steps=STEPS, samples=2,
        size=16, guidance=3.0, dtype="float32", device="cpu", measured=2, bound=0.01, cache_dir=folder / "cache",
    )  # fmt: skip
    return ["tune", *(word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value)))]


def test_a_search_ends_in_a_file_that_enable_takes(folder, command, capsys, monkeypatch):
    monkeypatch.setattr(tune, "CACHES", (("fora", 2), ("smoothcache", 0.7), ("teacache", 0.3)))
    assert main(command) == 0, capsys.readouterr().err
    text = capsys.readouterr().out
    assert "written: shiva_ext.enable(pipe" in text and "* " in text
    content = json.loads((folder / "tuned.json").read_text())
    assert content["measured"]["speed_up"] > 0 and content["measured"]["samples"] == 2
    found = shiva_ext.Configuration.load(folder / "tuned.json")
    pipe = load_pipeline(str(folder / "model"), None, torch.float32)
    before = dict(pipe.transformer.named_parameters())
    with shiva_ext.enable(pipe, folder / "tuned.json"):
        pipe("a cat", num_inference_steps=found.steps, height=16, width=16, output_type="np")
    assert not any(hasattr(m, "_diffusers_hook") for m in pipe.transformer.modules())
    assert all(torch.equal(p, before[name]) for name, p in pipe.transformer.named_parameters())
    # Again: everything is found on disk.
    monkeypatch.setattr(tune.TuneStudy, "generate", lambda *_: pytest.fail("a finished trial ran again"))
    assert main(command) == 0
    assert json.loads((folder / "tuned.json").read_text()) == content


@pytest.mark.parametrize(("name", "cache"), [("fora", FORA(2)), ("guidance", GuidanceCache(2))])
def test_a_configuration_of_both_equals_enabling_both(folder, tmp_path, name, cache):
    pipe = load_pipeline(str(folder / "model"), None, torch.float32)
    call = dict(prompt="a cat", num_inference_steps=4, height=16, width=16, output_type="np")

    def picture():
        return torch.from_numpy(pipe(**call, generator=torch.Generator().manual_seed(0)).images)

    dense = picture()
    shiva_ext.enable(pipe, folder / "artefact", budget=0.5)
    shiva_ext.enable(pipe, cache)
    wanted = picture()
    shiva_ext.disable(pipe)
    configuration = shiva_ext.Configuration(4, str(folder / "artefact"), 0.5, name, 2)
    configuration.save(tmp_path / "both.json")
    with shiva_ext.enable(pipe, tmp_path / "both.json") as both:
        assert torch.equal(picture(), wanted) and not torch.equal(wanted, dense)
        assert both.selection is not None and both.cache is not None
    assert torch.equal(picture(), dense)
    with pytest.raises(ValueError, match="has all settings in it"):
        shiva_ext.enable(pipe, configuration, ratio=0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no calibration"),
        ('{"configuration": 1}', "is no configuration"),
        ('{"configuration": 99, "shiva_ext": "9"}', "knows up to 1; upgrade it"),
        (
            '{"configuration": 1, "shiva_ext": "0", "calibration": null, "steps": 4, "cache": "magic"}',
            "a cache 'magic'",
        ),
        (
            '{"configuration": 1, "shiva_ext": "0", "calibration": null, "steps": 4, "cache": "teacache"}',
            "no calibration",
        ),
    ],
)
def test_files_that_are_something_else_are_refused(folder, tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    pipe = load_pipeline(str(folder / "model"), None, torch.float32)
    with pytest.raises(ValueError, match=message):
        shiva_ext.enable(pipe, tmp_path / "x.json")
    assert not any(hasattr(m, "_diffusers_hook") for m in pipe.transformer.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "1x"], "budget is 1x"),
        (["--bound", "0"], "bound is 0"),
        (["--out", "x.txt"], "ending in .json"),
        (["--dtype", "int4"], "dtype is 'int4'"),
        (["--steps", "1"], "steps at least 2"),
        (["--model", "nowhere"], "not a folder here"),
        (["--bound", "1"], "nothing that was measured"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder, command, capsys, options, message):
    assert main([*command, *options]) == 1
    *_, last, end = capsys.readouterr().err.split("\n")  # above it the progress of loading
    assert message in last and end == ""


def test_a_budget_that_is_no_number(command, capsys):
    with pytest.raises(SystemExit):
        main([*command, "--budget", "fast"])
    assert "wanted a speed-up such as 2.5x" in capsys.readouterr().err


def test_what_a_model_refuses_is_kept_as_well(folder, tmp_path, capsys, monkeypatch):
    study = tune.TuneStudy(
        load_pipeline(str(folder / "model"), None, torch.float32), {}, ["a cat"], tmp_path, 1, STEPS, 3.0, 16
    )
    dense, refused = cell_of(STEPS), cell_of(2, None, ("smoothcache", 0.1))  # both steps of two are computed
    assert tune._tried(study, refused, dense) is None
    monkeypatch.setattr(tune.TuneStudy, "generate", lambda *_: pytest.fail("a refused trial ran again"))
    assert tune._tried(study, refused, dense) is None
    first, second = (line for line in capsys.readouterr().out.splitlines() if "is left out" in line)
    assert first == second and "smoothcache" in first


def test_a_testbed_brings_its_own_prompts_selection_and_settings(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "CACHES", (("fora", 2),))
    monkeypatch.setattr(tune, "BUDGETS", (0.6,))
    monkeypatch.setattr(tune, "TESTBED_STEPS", 4)
    found = tune.run(
        "fashion", tmp_path / "t.json", bound=0.01, samples=2, measured=1, cache_dir=tmp_path / "c", timing_repeats=1
    )
    text = capsys.readouterr().out
    assert "Shiva 60%, 4 steps" in text and "fora 2, 4 steps" in text and "3 steps" in text
    assert found.measured["samples"] == 2 and found.measured["dense_steps"] == 4
    assert shiva_ext.Configuration.load(tmp_path / "t.json") == found


@pytest.mark.parametrize("given", [dict(prompts="x.txt"), dict(size=64), dict(revision="0")])
def test_what_a_testbed_has_of_its_own_is_not_given(given, tmp_path):
    with pytest.raises(ValueError, match="are not for the testbed 'emoji'"):
        tune.run("emoji", tmp_path / "t.json", cache_dir=tmp_path, **given)
