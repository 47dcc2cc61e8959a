"""The command line, and the demonstration on the models that ship."""

import json

import pytest
from PIL import Image

import shiva_ext
from shiva_ext.cli import main
from shiva_ext.testbed import demo


def test_info_prints_the_build(capsys):
    assert main(["info"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == shiva_ext.__version__


def test_without_a_command_the_commands_are_named(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "train" in capsys.readouterr().err


def test_every_setting_of_the_testbed_training_is_an_option(capsys):
    with pytest.raises(SystemExit):
        main(["train", "testbed", "--help"])
    text = capsys.readouterr().out
    assert all(option in text for option in ("--budget", "--estimator", "--adapter-rank", "--control"))


def test_missing_data_is_one_line_that_says_how_to_get_it(tmp_path, capsys):
    assert main(["train", "dense", "--out", str(tmp_path), "--data-dir", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert "apt-get install dataset-fashion-mnist" in message and "Traceback" not in message


def test_a_setting_out_of_range_is_one_line(tmp_path, capsys):
    assert main(["train", "testbed", "--out", str(tmp_path), "--budget", "1.5"]) == 1
    assert "budget is 1.5" in capsys.readouterr().err


def test_the_demonstration_shows_pruned_models_at_their_budgets(tmp_path, capsys):
    rows = demo.run(tmp_path, steps=2)
    assert rows["dense"]["kept"] == 1
    assert rows["Shiva 80 %"]["kept"] == pytest.approx(0.8, abs=0.08)
    assert rows["Shiva 60 %"]["kept"] == pytest.approx(0.6, abs=0.08)
    assert rows["dense"]["gflops"] > rows["Shiva 80 %"]["gflops"] > rows["Shiva 60 %"]["gflops"]
    assert all(row["psnr"] > 10 for name, row in rows.items() if name != "dense")
    assert Image.open(tmp_path / "demo.png").size[0] > 600
    assert "speed-up" in capsys.readouterr().out
