"""What tokens are worth to an artefact: against the loss itself, and as a command."""

import json

import pytest
import torch

from shiva_ext.bench.schedule import Worth, run, values_of
from shiva_ext.cli import main
from shiva_ext.testbed.model import ASSETS


def test_the_spread_is_that_of_ratios_which_are_free_to_move():
    def spread(ratios, values):
        return Worth(None, torch.tensor(ratios), torch.tensor(values)).spread

    assert spread([[1.0, 0.5, 0.6], [1.0, 0.4, 0.3]], [[0.0, 1.0, 3.0], [9.0, 1.0, 3.0]]) == pytest.approx(0.5)
    assert spread([[1.0, 0.2, 0.6, 0.7]], [[0.0, 9.0, 2.0, 2.0]]) == 0


@pytest.fixture(scope="module")
def measured():
    return values_of(ASSETS / "shiva60", budget=0.5, samples=8)


def test_values_come_with_the_ratios_of_the_budget(measured):
    sigmas, ratios, values = measured
    assert sigmas.tolist() == pytest.approx([0.1 * i for i in range(1, 11)])
    assert (ratios[:, 0] == 1).all() and ratios[:, 1:].mean().item() == pytest.approx(0.5, abs=0.02)
    assert (values[:, 0] == 0).all() and values[:, 1:].mean() > 0  # more tokens are better


def test_a_larger_budget_makes_tokens_worth_less(measured):
    more = values_of(ASSETS / "shiva60", budget=0.7, samples=8).values
    assert more[:, 1:].mean() < measured.values[:, 1:].mean()


def test_the_command_prints_and_writes(tmp_path, capsys):
    name = str(ASSETS / "shiva60")
    assert main(["bench", "schedule", "--artefacts", name, "--samples", "8", "--out", str(tmp_path)]) == 0
    assert "what one more is worth" in capsys.readouterr().out
    content = json.loads((tmp_path / "schedule.json").read_text())
    assert set(content["artefacts"]) == {name} and content["artefacts"][name]["spread"] > 0


@pytest.mark.parametrize(("name", "budget"), [("sparsedit60", None), ("shiva60", 0.1), ("shiva60", 1.5)])
def test_another_method_and_another_range_are_refused(name, budget, tmp_path):
    with pytest.raises(ValueError, match="wanted"):
        run([str(ASSETS / name)], budget, 8, tmp_path)
    assert not list(tmp_path.iterdir())
