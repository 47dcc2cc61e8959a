"""``shiva train vlm`` and ``shiva bench feather``, as short as can be."""

import json

import pytest
import torch

from shiva_ext.bench import feather
from shiva_ext.cli import main
from shiva_ext.testbed import quadrants
from shiva_ext.testbed.data import load_split, to_float


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("vlm")
    options = ["--steps", "2", "--batch-size", "2", "--layers", "4", "--width", "64"]
    assert main(["train", "vlm", "--out", str(out), *options]) == 0
    return out


def test_a_question_shows_four_pictures_and_asks_for_one():
    images, labels = load_split("test")
    asked, wanted = quadrants.questions(images, labels, 50, torch.Generator().manual_seed(3))
    assert asked["pixel_values"].shape == (50, 1, 56, 56) and asked["input_ids"].shape == (50, 14 * 14 + 3)
    assert (asked["input_ids"] == quadrants.IMAGE).sum(dim=1).eq(196).all()
    inner = to_float(images)[:, 0, 2:30, 2:30]
    for pixels, ids, label in zip(asked["pixel_values"], asked["input_ids"], wanted, strict=True):
        quadrant = int(ids[-2]) - quadrants.FIRST_QUADRANT
        row, column = divmod(quadrant, 2)
        tile = pixels[0, 28 * row : 28 * row + 28, 28 * column : 28 * column + 28]
        same = (inner - tile).abs().flatten(1).sum(dim=1) == 0
        assert label in labels[same]


def test_the_bench_prunes_in_every_way_and_measures_the_bias(folder, tmp_path, capsys):
    content = feather.run(folder, 12, out=tmp_path)
    assert json.loads((tmp_path / "feather.json").read_text()) == content
    assert (tmp_path / "feather.png").stat().st_size > 10_000
    names = [row["name"] for row in content["rows"]]
    assert names[0] == "all tokens" and names[-1] == "FEATHER, layers 1 and 2"
    saved = [row["operations_saved"] for row in content["rows"]]
    assert saved[0] == 0 and all(0.3 < each < 0.8 for each in saved[1:])
    assert [each["layer"] for each in content["height"]] == [1, 2, 3]
    assert all(0 <= each[key] <= 1 for each in content["height"] for key in ("rope", "no_rope"))
    assert "top left" in capsys.readouterr().out


def test_the_rows_are_the_papers_on_its_own_depth():
    layers = [row.config for row in feather.rows(32)]
    assert layers[1].layer == 3 and layers[4].layer == 8 and layers[-1].layers == (8, 16)


def test_the_height_of_known_tokens(monkeypatch, folder):
    class Handle:
        kept = [[torch.tensor([0, 13]), torch.tensor([13 * 14, 195])]]

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(feather.shiva_ext, "enable", lambda model, config: Handle())
    monkeypatch.setattr(feather.quadrants, "answer", lambda model, asked: None)
    assert feather.heights(None, [(None, None)], 1, True) == 0.5


def test_a_missing_model_names_its_command(tmp_path, capsys):
    assert main(["bench", "feather", "--vlm", str(tmp_path)]) == 1
    assert "run 'shiva train vlm --out" in capsys.readouterr().err
