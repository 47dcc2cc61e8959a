"""The synthetic task: the figures that its docstring derives, and what it leaves behind."""

import json

import pytest
import torch

from shiva_ext.bench import synthetic


def test_the_published_estimator_settles_just_below_the_number_of_signal_tokens():
    history = synthetic.train("residual", seed=0, **synthetic.START)
    late = history["k"][-synthetic.SETTLED :]
    assert history["k"][: synthetic.WARMUP] == [synthetic.FIRST_K] * synthetic.WARMUP
    assert 16 <= min(late) and max(late) <= 20
    assert sum(history["accuracy"][-synthetic.SETTLED :]) / synthetic.SETTLED >= 0.95


def test_the_counterfactual_estimator_settles_where_its_docstring_derives():
    history = synthetic.train("counterfactual", seed=0, **synthetic.START)
    assert history["k"][-1] == pytest.approx(41.7, abs=1)
    assert synthetic.train("counterfactual", seed=0)["k"][-1] == pytest.approx(22.7, abs=0.7)


def test_every_gradient_cosine_is_positive_and_their_mean_is_the_papers():
    cosines = synthetic.gradient_cosines("residual", seed=0, trials=150)
    assert cosines.shape == (150,) and cosines.min() > 0
    assert 0.80 <= cosines.mean() <= 0.85


def test_a_run_is_reproducible_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = synthetic.gradient_cosines("residual", seed=3, trials=5, fresh_router=True)
    assert torch.equal(synthetic.gradient_cosines("residual", seed=3, trials=5, fresh_router=True), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_run_writes_the_table_and_the_figure(tmp_path, monkeypatch, capsys):
    for name, value in (("STEPS", 20), ("WARMUP", 5), ("TRIALS", 10), ("SETTLED", 10)):
        monkeypatch.setattr(synthetic, name, value)
    result = synthetic.run(seeds=2, out_dir=str(tmp_path / "deep" / "results"))
    assert json.loads((tmp_path / "deep" / "results" / "synthetic.json").read_text()) == result
    assert (tmp_path / "deep" / "results" / "synthetic.png").stat().st_size > 10_000
    assert set(result["runs"]) == set(synthetic.VARIANTS) and len(result["runs"]["residual"]) == 2
    assert "gradient cosine" in capsys.readouterr().out
    with pytest.raises(ValueError, match="seeds is 0"):
        synthetic.run(seeds=0, out_dir=str(tmp_path))
