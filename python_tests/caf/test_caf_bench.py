"""``shiva bench caf`` on untrained networks: what it counts, what it keeps, and what its flows do."""

import json
from functools import partial

import pytest
import torch

from shiva_ext.bench import caf as bench
from shiva_ext.bench.caf_flows import AccelerationFlow, VelocityFlow
from shiva_ext.caf import fashion
from shiva_ext.cli import main
from shiva_ext.testbed import beds
from shiva_ext.testbed.model import load_model
from shiva_ext.testbed.sampling import balanced_labels, generate, make_noise

from .networks import CHANNELS, SIDE, TEXT, Oracle, draw, make_oracles, make_sd3

X0, X1 = draw(2, CHANNELS, SIDE, SIDE, seed=1), draw(2, CHANNELS, SIDE, SIDE, seed=2)
LABELS = torch.tensor([1, 2])


def no_prompts(labels):
    return torch.zeros(len(labels), 3, TEXT), torch.zeros(len(labels), TEXT)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_dir):
    """Both trainings by their commands, as short as can be; the pairs are few and of two steps."""
    folder = tmp_path_factory.mktemp("caf")
    patch = pytest.MonkeyPatch()
    patch.setattr(fashion, "fashion_pairs", partial(fashion.fashion_pairs, steps=2, chunk=2))
    options = ["--pairs", "3", "--pairs-dir", str(folder / "pairs"), "--dense-model", str(model_dir)]
    options += ["--velocity-steps", "2", "--acceleration-steps", "1", "--batch-size", "2"]
    for command in ("caf", "rectified-flow"):
        assert main(["train", command, "--out", str(folder / command), *options]) == 0
    patch.undo()
    return folder


def test_the_commands_leave_a_pipeline_and_an_ordinary_model(trained):
    assert (trained / "caf" / "pipeline" / "model_index.json").is_file()
    assert (trained / "caf" / "prompts.safetensors").is_file()
    transformer, _ = load_model(trained / "rectified-flow")
    assert transformer.config.in_channels == 1
    record = json.loads((trained / "caf" / "training.json").read_text())
    assert record["pairs"]["count"] == 3 and record["config"]["velocity_steps"] == 2
    assert len(list((trained / "pairs").glob("pairs-*"))) == 2  # made once for both


def test_a_finished_command_is_not_started_again_without_resume(trained, model_dir, capsys):
    options = ["--pairs", "3", "--pairs-dir", str(trained / "pairs"), "--dense-model", str(model_dir)]
    assert main(["train", "caf", "--out", str(trained / "caf"), *options]) == 1
    assert "holds a run already; resume it (--resume)" in capsys.readouterr().err
    assert main(["train", "caf", "--out", str(trained / "other"), *options]) == 1
    assert "made otherwise" in capsys.readouterr().err  # 25 steps a pair, not 2


def test_the_bench_writes_its_results_and_goes_on_from_its_cache(trained, model_dir, tmp_path, monkeypatch, capsys):
    rows = tuple(row for row in bench.ROWS if row.steps < 3) + (bench.Row(bench.TEACHER, bench.TEACHER_STEPS),)
    monkeypatch.setattr(bench, "STRAIGHTNESS_STEPS", 2)
    monkeypatch.setattr(bench, "INVERSION_STEPS", (1,))
    monkeypatch.setattr(beds, "bootstrap_distances", partial(beds.bootstrap_distances, draws=4))
    place = dict(caf=trained / "caf", control=trained / "rectified-flow", dense_model=model_dir)
    place |= dict(out=tmp_path / "results", cache_dir=tmp_path / "cache")
    content = bench.run(12, rows=rows, **place)
    assert json.loads((tmp_path / "results" / "caf.json").read_text()) == content
    assert (tmp_path / "results" / "caf.png").stat().st_size > 10_000
    assert [(r["method"], r["steps"], r["evaluations"]) for r in content["rows"]] == [
        ("CAF", 1, 2), ("CAF", 2, 3), ("rectified flow", 1, 1), ("rectified flow", 2, 2), ("dense", 1, 2),
        ("dense", 2, 4), ("teacher", 25, 50),
    ]  # fmt: skip
    assert [each["evaluations"] for each in content["differences"]] == [2]
    assert set(content["straightness"]) == {"CAF", "rectified flow", "dense"}
    assert [(e["method"], e["evaluations"]) for e in content["inversion"]] == [("CAF", 3), ("rectified flow", 2)]
    assert "so it has no row at 1" in capsys.readouterr().out
    monkeypatch.setattr(bench.Study, "flow", lambda *_: pytest.fail("sampled again"))
    assert bench.run(12, rows=rows, **place) == content


def test_missing_trainings_name_the_command(tmp_path, capsys):
    assert main(["bench", "caf", "--caf", str(tmp_path), "--out", str(tmp_path)]) == 1
    assert "train it with 'shiva train caf --out" in capsys.readouterr().err
    with pytest.raises(ValueError, match="samples is 1, wanted at least 2"):
        bench.run(1)


@pytest.mark.parametrize("N", [1, 2, 5])
def test_flows_on_oracles_are_straight_exact_and_invertible(N):
    acceleration = AccelerationFlow(make_oracles(X0, X1, 1.5), no_prompts)
    velocity = VelocityFlow(make_sd3(Oracle).tell(X0 - X1), no_prompts)
    for flow in (acceleration, velocity):
        torch.testing.assert_close(flow.generate(LABELS, X0, N), X1, rtol=0, atol=1e-5)
        again, _ = flow.reconstruct(LABELS, X1, N)
        torch.testing.assert_close(again, X1, rtol=0, atol=1e-5)
        assert flow.straightness(LABELS, X0, N) < 1e-10
    assert acceleration.reconstruct(LABELS, X1, N)[1] == 2 * N + 1
    assert velocity.reconstruct(LABELS, X1, N)[1] == 2 * N


def test_evaluations_are_as_many_as_the_rows_say():
    for row in bench.ROWS[:-1]:
        if row.method == bench.CAF:
            pipe = make_oracles(X0, X1, 1.5)
            AccelerationFlow(pipe, no_prompts).generate(LABELS, X0, row.steps)
            asked = pipe.velocity.shares + pipe.acceleration.shares
        else:
            guided = row.method == bench.DENSE
            network = make_sd3(Oracle).tell((X0 - X1).repeat(2 if guided else 1, 1, 1, 1))
            VelocityFlow(network, no_prompts, 2.0 if guided else 1.0).generate(LABELS, X0, row.steps)
            asked = network.shares
        assert sum(map(len, asked)) == row.evaluations * len(LABELS)


def test_euler_steps_are_even_and_guided_as_the_testbed_guides(model_dir):
    """One step of diffusers' own schedule is even, too."""
    transformer, prompts = load_model(model_dir)
    labels, noise = balanced_labels(3), make_noise(3, 0)
    flow = VelocityFlow(transformer, prompts, guidance=2.0, null_prompt=10)
    wanted = generate(transformer, prompts, labels, noise, 1, 2.0)
    torch.testing.assert_close(flow.generate(labels, noise, 1), wanted, rtol=1e-4, atol=1e-4)
    network = make_sd3(Oracle).tell(X0)
    VelocityFlow(network, no_prompts).generate(LABELS, X0, 4)
    assert [shares[0] for shares in network.shares] == [0, 0.25, 0.5, 0.75]
