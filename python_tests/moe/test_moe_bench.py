"""``shiva train experts`` and ``shiva bench moe`` on a small model."""

import json

import pytest
import torch

from shiva_ext import moe
from shiva_ext.bench import moe as bench
from shiva_ext.cli import main
from shiva_ext.testbed import experts
from shiva_ext.testbed.model import load_model


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_dir):
    folder = tmp_path_factory.mktemp("moe")
    options = ["--dense-model", str(model_dir), "--steps", "2", "--batch-size", "2", "--warmup", "1"]
    assert main(["train", "experts", "--out", str(folder / "experts"), *options]) == 0
    assert main(["train", "experts", "--control", "--out", str(folder / "control"), *options]) == 0
    return folder


def test_both_see_the_same_pictures_and_noise(model_dir, tmp_path, monkeypatch):
    seen, original = [], experts.flow_matching_batch

    def watched(pixels, sigma, generator):
        noisy, target = original(pixels, sigma, generator)
        seen[-1].append(noisy)
        return noisy, target

    monkeypatch.setattr(experts, "flow_matching_batch", watched)
    for control in (False, True):
        seen.append([])
        experts.train(experts.ExpertsConfig(steps=2, batch_size=2), tmp_path / str(control), model_dir, None, control)
    assert len(seen[0]) == 2 and all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_both_begin_as_the_same_model_and_have_the_same_compute(trained, model_dir):
    records = [json.loads((trained / name / "training.json").read_text()) for name in ("experts", "control")]
    assert records[0]["config"] == records[1]["config"] and not records[0]["control"] and records[1]["control"]
    sparse, (dense, _) = moe.load(trained / "experts" / "transformer"), load_model(trained / "control")
    assert sparse.dtype == torch.bfloat16 and len(moe.expert_layers(sparse)) == 2
    assert moe.count_parameters(sparse)[1] == pytest.approx(moe.count_parameters(dense)[1], rel=0.02)


def test_the_bench_measures_three_models_and_draws_where_the_choices_go(trained, model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "STEPS", 2)
    content = bench.run(
        12, trained / "experts", trained / "control", dense_model=model_dir, out=tmp_path / "results", repeats=1
    )
    assert json.loads((tmp_path / "results" / "moe.json").read_text()) == content
    assert (tmp_path / "results" / "moe.png").stat().st_size > 10_000
    assert [row["name"] for row in content["rows"]] == [bench.DENSE, bench.CONTROL, bench.EXPERTS]
    load = torch.tensor(content["load"])
    assert load.shape == (2, 2, 8)
    torch.testing.assert_close(load.sum(dim=-1), torch.ones(2, 2), rtol=0, atol=1e-3)
    assert all(0 <= each <= 1 for each in [*content["explained_by_step"], *content["explained_by_position"]])


def test_the_held_out_loss_is_the_mean_over_the_pictures(model_dir):
    transformer, prompts = load_model(model_dir)
    whole = bench.held_out_loss(transformer, prompts, 6, 6)
    assert whole == pytest.approx(bench.held_out_loss(transformer, prompts, 6, 6))
    assert 0.1 < whole < 3


@pytest.mark.parametrize(
    ("shares", "wanted"),
    [([[0.5, 0.5], [0.5, 0.5]], 0.0), ([[1.0, 0.0], [0.0, 1.0]], 1.0), ([[0.75, 0.25], [0.25, 0.75]], 0.1887)],
)
def test_the_dependence_is_the_share_of_the_entropy_that_an_axis_explains(shares, wanted):
    assert bench.dependence(torch.tensor(shares, dtype=torch.float64)) == pytest.approx(wanted, abs=1e-4)


def test_a_missing_training_names_its_command(tmp_path, capsys):
    options = ["--experts", str(tmp_path), "--control", str(tmp_path / "no")]
    assert main(["bench", "moe", *options]) == 1
    assert "run 'shiva train experts --control --out" in capsys.readouterr().err
    with pytest.raises(ValueError, match="samples is 1"):
        bench.run(1)
