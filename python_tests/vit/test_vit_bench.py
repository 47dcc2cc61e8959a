"""``shiva train vit`` and ``shiva bench vit`` from end to end on a few pictures."""

import json

import pytest
import torch

from shiva_ext.bench import vit as bench
from shiva_ext.cli import main
from shiva_ext.testbed import vit as bed


@pytest.fixture(autouse=True)
def pictures(monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def load_split(split, data_dir=None):
        images = torch.randint(256, (40, 1, 32, 32), dtype=torch.uint8, generator=generator)
        return images, torch.randint(10, (40,), generator=generator)

    monkeypatch.setattr(bed, "load_split", load_split)
    monkeypatch.setattr(bench, "load_split", load_split)


SMALL = ["--steps", "2", "--prune-steps", "2", "--batch-size", "4", "--depth", "6", "--width", "64"]


def test_every_way_is_trained_and_measured(tmp_path, capsys):
    assert main(["train", "vit", "--out", str(tmp_path / "vit"), *SMALL]) == 0
    assert {path.name for path in (tmp_path / "vit").iterdir()} == {bed.DENSE, bed.DENSE_ON, *bed.METHODS}
    arguments = ["bench", "vit", "--vit", str(tmp_path / "vit"), "--samples", "20", "--repeats", "1"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    rows = json.loads((tmp_path / "vit.json").read_text())["rows"]
    assert (tmp_path / "vit.png").stat().st_size > 1000 and len(rows) == 2 + len(bench.NAMES) * len(bench.KEEPS)
    assert all(name in shown for name in bench.NAMES.values())
    found = {(row["name"], row["keep"]): row for row in rows}
    assert found["dense", None]["patches"] == 100
    # After block 1 of 6, 60 patches; and 60 in blocks 2 to 4 of 6.
    assert found["TNT", 0.6]["patches"] == pytest.approx((2 * 100 + 4 * 60) / 6)
    assert found["counterfactual", 0.6]["patches"] == pytest.approx((3 * 100 + 3 * 60) / 6)
    assert found["random", 0.2]["mflops"] < found["random", 0.8]["mflops"] < found["dense", None]["mflops"]


def test_the_operations_are_those_of_matrix_products():
    """Attention's two products and the linear layers of one block, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    config = bed.ViTTrainConfig(depth=1)
    model = bed.build(config)
    model.set_attn_implementation("eager")  # whose products the counter sees
    layer = model.vit.layers[0]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.randn(1, 101, config.width))
    assert counter.get_total_flops() == bench.flops([101], config.width)


def test_a_run_goes_on_and_leaves_alone_what_is_done(tmp_path):
    out = str(tmp_path / "vit")
    assert main(["train", "vit", "--out", out, *SMALL, "--methods", "dynamicvit"]) == 0
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}
    assert main(["train", "vit", "--out", out, *SMALL, "--methods", "dynamicvit", "residual"]) == 0
    assert all(path.stat().st_mtime_ns == before for path, before in written.items())
    assert (tmp_path / "vit" / "residual" / "patches.json").is_file()


def test_what_is_missing_or_unknown_is_said(tmp_path, capsys):
    assert main(["bench", "vit", "--vit", str(tmp_path)]) == 1
    assert "run 'shiva train vit --out" in capsys.readouterr().err
    assert main(["train", "vit", "--out", str(tmp_path), *SMALL, "--methods", "magic"]) == 1
    assert "unknown magic; there are dense_on, tnt" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_annealing_reaches_the_estimator(tmp_path, monkeypatch):
    seen, data = [], bed.load_split("train")
    modules = torch.nn.ModuleDict({"vit": bed.build(bed.ViTTrainConfig(width=64)), "pruner": None})
    modules["pruner"] = bed.PatchPruner(bed.METHODS["counterfactual"], 64)
    estimator, apply = modules["pruner"].estimator, type(modules["pruner"].estimator).apply
    monkeypatch.setattr(type(estimator), "apply", lambda self, *args: seen.append(self.progress) or apply(self, *args))
    config = bed.ViTTrainConfig(batch_size=2, width=64, checkpoint_every=4)
    bed._run(modules, config, 4, tmp_path / "run", data)
    assert sorted(set(seen)) == [0.0, 0.25, 0.5, 0.75]
