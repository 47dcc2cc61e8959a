"""The sweep on a small untrained model: it goes on where it stopped, and its page needs nothing else."""

import json
import re

import pytest
import torch
from diffusers import SD3Transformer2DModel
from PIL import Image

from shiva_ext.bench import pareto
from shiva_ext.bench.pareto_page import duels
from shiva_ext.testbed.beds import Emoji, get_testbed
from shiva_ext.testbed.emoji import TRANSFORMER_CONFIG, compose, load_pictures
from shiva_ext.testbed.report import Study
from shiva_ext.testbed.rows import Row

STEPS = 2
ROWS = [
    Row("dense", steps=STEPS, group="dense"),
    Row("fewer steps 1", steps=1, group="fewer steps"),
    Row("Shiva 60 %", "selector", "random", 0.6, STEPS, group="Shiva"),
    Row("ToMeSD 0.5", "method", "tomesd", 1.0, STEPS, group="ToMeSD", options=(("ratio", 0.5), ("sites", ("block",)))),
    Row("SDTM 0.3", "method", "sdtm", 1.0, STEPS, group="SDTM"),
    Row("last", "selector", "largest_norm", 0.6, STEPS, group="norm", options=(("reconstruct", "last"),)),
]


@pytest.fixture(scope="module")
def swept(model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")

    def sweep(**changes):
        settings = dict(samples=6, rows=ROWS, batch_size=6, steps=STEPS, timing_repeats=1) | changes
        return pareto.run(out=folder / "out", cache_dir=folder / "cache", model_dir=model_dir, **settings)

    return folder, sweep, sweep()


def test_every_cell_has_its_numbers(swept):
    folder, _, content = swept
    assert json.loads((folder / "out" / "pareto.json").read_text()) == content
    found = {cell["name"]: cell for cell in content["cells"].values()}
    assert set(found) == {row.name for row in ROWS}
    for cell in found.values():
        assert cell["fid"] > 0 and cell["fid_error"] > 0 and cell["speed_up"] > 0 and cell["gflops"] > 0
        assert cell["ssim"] <= 1 and cell["strip"]
    assert found["dense"]["ssim"] == pytest.approx(1) and found["dense"]["psnr"] is None
    assert found["ToMeSD 0.5"]["gflops"] < found["dense"]["gflops"] and found["ToMeSD 0.5"]["kept"]
    assert found["fewer steps 1"]["gflops"] == pytest.approx(found["dense"]["gflops"] / 2)
    assert set(duels(list(found.values()))) == {"fewer steps", "ToMeSD", "SDTM", "norm"}


def test_the_page_shows_every_cell_and_loads_nothing(swept):
    folder, *_ = swept
    page = (folder / "out" / "pareto.html").read_text()
    for row in ROWS:
        assert page.count(f"<td>{row.name}</td>") == 2
    assert not re.findall(r'(?:src|href|srcset)="(?!data:)', page)
    assert Image.open(folder / "out" / "pareto.png").size[0] > 800


def test_finished_cells_are_read_not_computed(swept, monkeypatch):
    _, sweep, content = swept
    for name in ("sample", "timing"):
        monkeypatch.setattr(Study, name, lambda *_: pytest.fail("a finished cell was computed again"))
    assert sweep() == content


def test_finished_cells_can_be_timed_again_in_one_sitting(swept, monkeypatch):
    _, sweep, content = swept
    timed, original = [], Study._generate

    def generate(study, transformer, prompts, labels, noise, row):
        timed.append(row.name)
        return original(study, transformer, prompts, labels, noise, row)

    monkeypatch.setattr(Study, "_generate", generate)
    monkeypatch.setattr(Study, "sample", lambda *_: pytest.fail("a finished cell was sampled again"))
    again = sweep(retime=True)
    pairs = [name for row in ROWS for name in ("dense", row.name)]
    assert timed == 2 * pairs  # the first turn is not counted
    for key, cell in again["cells"].items():
        other = {name for name in cell if cell[name] != content["cells"][key][name]}
        assert "seconds" in other and other <= {"seconds", "dense_seconds", "speed_up", "speed_up_range"}
    timed.clear()
    assert sweep() == again and not timed
    content |= again  # what later tests compare with


def test_a_method_alone_keeps_the_cells_of_others(swept):
    _, sweep, content = swept
    assert sweep(methods=["SDTM"])["cells"] == content["cells"]
    with pytest.raises(ValueError, match="unknown method 'TurboMerge'"):
        sweep(methods=["TurboMerge"])


def test_more_seeds_for_those_that_are_close(swept):
    """Their distance is the mean over the seeds; other cells stay, and so do they when one seed is asked for."""
    _, sweep, content = swept
    name = next(key for key, cell in content["cells"].items() if cell["method"] == "SDTM")
    more = sweep(methods=["SDTM"], seeds=2)
    cell = more["cells"][name]
    assert len(cell["fid_seeds"]) == 2 and cell["fid_seeds"][0] == content["cells"][name]["fid"]
    assert cell["fid"] == pytest.approx(sum(cell["fid_seeds"]) / 2) and cell["fid_seeds"][0] != cell["fid_seeds"][1]
    others = [key for key, each in content["cells"].items() if each["method"] not in ("SDTM", "dense")]
    assert all(more["cells"][key] == content["cells"][key] for key in others)
    assert sweep()["cells"] == more["cells"]


def test_other_settings_are_other_cells(swept, model_dir, tmp_path):
    _, _, content = swept
    study = Study(tmp_path, 7, 1, model_dir, steps=STEPS, batch_size=6)
    assert not {pareto.key(study, row) for row in ROWS} & set(content["cells"])


def test_the_shipped_sweep_has_four_strengths_of_every_rival():
    rows = pareto.cells()
    assert len({row.name for row in rows}) == len(rows)
    for name in (
        "Shiva",
        "fewer steps",
        "ToMeSD",
        "ToFu",
        "ToMA",
        "IBTM",
        "SDTM",
        "SparseDiT",
        "DiffCR",
        "DyDiT",
        "random",
        "largest norm",
    ):
        assert sum(row.group == name for row in rows) >= 4
    assert {"dense", "dense fine-tuned"} <= {row.group for row in rows}


def test_the_other_testbed_runs_through_the_same_sweep(tmp_path, monkeypatch):
    """Colour, other labels, no foreground to be told: with a tiny model in place of the trained one."""
    pytest.importorskip("emoji")
    monkeypatch.setattr(Emoji, "REAL", 200)
    torch.manual_seed(0)
    config = TRANSFORMER_CONFIG | dict(num_layers=2, num_attention_heads=1, caption_projection_dim=64)
    SD3Transformer2DModel(**config).save_pretrained(tmp_path / "model" / "transformer")
    rows = [row for row in ROWS if row.group in ("dense", "Shiva", "SDTM")]
    content = pareto.run(
        samples=4, rows=rows, testbed="emoji", model_dir=tmp_path / "model", out=tmp_path, cache_dir=tmp_path / "cache",
        batch_size=4, steps=STEPS, timing_repeats=1,
    )  # fmt: skip
    assert json.loads((tmp_path / "pareto_emoji.json").read_text()) == content
    assert (tmp_path / "pareto_emoji.html").is_file() and (tmp_path / "pareto_emoji.png").is_file()
    for cell in content["cells"].values():
        assert cell["foreground_recall"] is None and cell["fid"] > 0 and 0 <= cell["accuracy"] <= 1


def test_the_emoji_testbed_recognises_its_own_pictures(monkeypatch):
    pytest.importorskip("emoji")
    monkeypatch.setattr(Emoji, "REAL", 200)
    bed = Emoji()
    pictures, _ = load_pictures()
    labels = bed.labels(50)
    images, _ = compose(pictures[labels], torch.Generator().manual_seed(5))
    features, found = bed.measure(images)
    assert (found == labels).float().mean() > 0.9 and features.shape == (50, len(bed.statistics["mean"]))
    assert len(set(bed.labels(337).tolist())) == 337
    with pytest.raises(ValueError, match="wanted one of fashion, emoji"):
        get_testbed("celeba")
