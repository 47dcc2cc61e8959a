"""The sweep on one's own checkpoint: tiny pipelines of random weights, from the command line to the page."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from evaluation.tiny_weights import save_clip, save_reward
from PIL import Image
from training.tiny_pipeline import save_artifact, save_images, save_pipeline

import shiva_ext
from bench.tiny_checkpoints import save_flux, save_pixart
from shiva_ext.bench import model_study, pareto_model
from shiva_ext.bench.model_cells import PROMPTS, cells
from shiva_ext.bench.model_study import ModelStudy
from shiva_ext.bench.pareto_page import duels, plot, points
from shiva_ext.cli import main
from shiva_ext.evaluation import fid
from shiva_ext.evaluation.flops import sd3_forward_flops
from shiva_ext.evaluation.image_metric import mean_of, read_picture
from shiva_ext.evaluation.metrics import psnr, ssim
from shiva_ext.selection import RatioTable, ShivaRouter
from shiva_ext.training.fit import load_pipeline

STEPS, SAMPLES = 4, 3
SMALL = ["Shiva", "fewer steps", "ToMeSD"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline, an artefact for it, and the metrics' weights."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_pipeline(folder)
    save_artifact(folder)
    save_clip(folder / "clip")
    save_reward(folder / "reward")
    (folder / "prompts.txt").write_text("a cat\n\n  red dog \n")
    return folder


@pytest.fixture(scope="module")
def sweep(folder):
    def run(**changes):
        settings = dict(
            prompts=folder / "prompts.txt", samples=SAMPLES, steps=STEPS, guidance=3.0, size=16, dtype="float32",
            artefact=str(folder / "artefact"), metrics=["clip"], weights={"clip": str(folder / "clip")},
            out=folder / "out", cache_dir=folder / "cache", timing_repeats=1, device="cpu",
        )  # fmt: skip
        return pareto_model.run(str(folder / "model"), **settings | changes)

    return run


@pytest.fixture(scope="module")
def swept(sweep):
    return sweep()


def by_name(content):
    return {cell["name"]: cell for cell in content["cells"].values()}


def pictures(folder, name):
    """Pictures of a cell, float [SAMPLES,3,H,W] in [-1, 1], found by what their settings say."""
    study = make_study(folder)
    cell = next(each for each in cells(STEPS, 3, True) if each.name == name)
    return torch.stack([read_picture(file) for file in study.pictures(cell)]) / 127.5 - 1


def make_study(folder, **changes):
    settings = dict(
        identity={"folder": pareto_model.fingerprint(folder / "model")}, prompts=["a cat", "red dog"],
        cache_dir=folder / "cache", samples=SAMPLES, steps=STEPS, guidance=3.0, size=16,
        artefact=str(folder / "artefact"), timing_repeats=1,
    )  # fmt: skip
    return ModelStudy(load_pipeline(str(folder / "model"), None, torch.float32), **settings | changes)


def test_every_cell_has_its_numbers(folder, swept):
    assert json.loads((folder / "out" / "pareto_model.json").read_text()) == json.loads(json.dumps(swept))
    found = by_name(swept)
    assert list(found) == [cell.name for cell in cells(STEPS, 3, True)] and swept["skipped"] == {}
    dense = found["dense"]
    assert dense["psnr"] is None and dense["ssim"] == pytest.approx(1) and dense["quality"] == pytest.approx(0)
    for cell in found.values():
        assert cell["seconds"] > 0 and cell["speed_up"] > 0 and 0 <= cell["metrics"]["clip"]["value"] <= 100
        assert cell["quality"] == pytest.approx(1 - cell["ssim"]) and cell["strip"]
        if cell is not dense:
            assert cell["gflops"] < dense["gflops"] and cell["psnr"] < 80
    for method in ("Shiva", "ToMeSD", "ToFu", "ToMA", "IBTM", "SDTM", "random"):
        own = [cell for cell in found.values() if cell["method"] == method]
        assert len(own) == 4 and [cell["gflops"] for cell in own] == sorted((c["gflops"] for c in own), reverse=True)
        assert all(cell["kept_share"] < 1 and cell["kept"] for cell in own)


def test_the_numbers_are_those_of_the_pictures(folder, swept):
    found = by_name(swept)["ToMeSD 0.5"]
    mine, dense = pictures(folder, "ToMeSD 0.5"), pictures(folder, "dense")
    assert found["psnr"] == pytest.approx(psnr(mine, dense).mean().item())
    assert found["ssim"] == pytest.approx(ssim(mine, dense).mean().item(), abs=1e-6)
    assert found["psnr_error"] == pytest.approx(mean_of(psnr(mine, dense)).error)
    assert found["quality_draws"] == pytest.approx([1 - each for each in mean_of(ssim(mine, dense)).draws], abs=1e-5)


def test_operations_are_those_of_the_calls(folder, swept):
    model = load_pipeline(str(folder / "model"), None, torch.float32).transformer
    text = 8 + 256  # CLIP's tokens, and room for those of a T5
    found = by_name(swept)
    both = 2 * STEPS  # halves of guidance
    assert found["dense"]["gflops"] == pytest.approx(both * sd3_forward_flops(model, text, 64) / 1e9)
    assert found["fewer steps 2"]["gflops"] == pytest.approx(found["dense"]["gflops"] / 2)
    kept = {1: 38, 2: 38}  # of 64
    assert found["random 0.6"]["gflops"] == pytest.approx(both * sd3_forward_flops(model, text, 64, kept) / 1e9)
    assert found["random 0.6"]["kept_share"] == pytest.approx((64 + 2 * 38) / (3 * 64))
    routed = sd3_forward_flops(model, text, 64, kept, 16)
    assert found["Shiva 60 %"]["gflops"] == pytest.approx(both * routed / 1e9, rel=0.02)


def test_all_cells_begin_from_the_same_noise(folder, swept):
    """The fewer tokens are kept, the farther; but no cell is of other pictures."""
    dense = pictures(folder, "dense")
    for name in ("random 0.9", "Shiva 80 %", "IBTM 0.1"):
        same, other = psnr(pictures(folder, name), dense), psnr(pictures(folder, name), dense.roll(1, 0))
        assert (same > other + 10).all()
    assert not torch.equal(dense[0], dense[2])  # the same prompt, another seed


def test_the_pictures_are_the_pipelines_own(folder, swept):
    pipe = load_pipeline(str(folder / "model"), None, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    image = pipe(
        "red dog", num_inference_steps=STEPS, guidance_scale=3.0, height=16, width=16, generator=generator
    ).images[0]
    file = make_study(folder).pictures(cells(STEPS, 3, True)[0])[1]
    assert (read_picture(file).permute(1, 2, 0).numpy() == image).all()


def test_the_page_shows_every_cell_and_loads_nothing(folder, swept):
    page = (folder / "out" / "pareto_model.html").read_text()
    for name in by_name(swept):
        assert page.count(f"<td>{name}</td>") == 2
    assert "CLIP score" in page and "At equal time" in page and not re.findall(r'(?:src|href|srcset)="(?!data:)', page)
    assert Image.open(folder / "out" / "pareto_model.png").size[0] > 800
    assert len(duels(list(swept["cells"].values()))["random"]) == 4


def test_a_finished_sweep_is_read_not_computed(sweep, swept, monkeypatch):
    monkeypatch.setattr(ModelStudy, "generate", lambda *_: pytest.fail("a finished cell was computed again"))
    monkeypatch.setattr(pareto_model, "_to_dense", lambda *_: pytest.fail("measured again"))
    assert sweep() == swept


def test_another_metric_and_more_samples_use_the_pictures_that_are_there(folder, sweep, swept, monkeypatch):
    made, generate = [], ModelStudy.generate

    def count(study, indices, steps):
        made.extend(indices)
        return generate(study, indices, steps)

    monkeypatch.setattr(ModelStudy, "generate", count)
    weights = {"clip-iqa": str(folder / "clip"), "image-reward": str(folder / "reward")}
    found = by_name(sweep(metrics=["clip-iqa", "image-reward"], weights=weights, methods=["ToMA"], quality="clip-iqa"))
    assert made == []
    assert found["ToMA 0.1"]["quality"] == -found["ToMA 0.1"]["metrics"]["clip-iqa"]["value"] < 0
    assert found["ToMA 0.1"]["quality_name"] == "CLIP-IQA, negative"
    sweep(methods=["ToMA"], samples=SAMPLES + 1)
    assert made == [SAMPLES] * 5  # dense and four strengths


def test_other_settings_are_other_pictures(folder):
    before = make_study(folder)
    cell = next(each for each in cells(STEPS, 3, True) if each.name == "Shiva 60 %")
    for changes in (
        {"guidance": 4.0}, {"size": 32}, {"seed": 1}, {"prompts": ["a cat"]}, {"identity": {"folder": "x"}},
        {"batch_size": 2}, {"artefact": str(folder / "reward")},
    ):  # fmt: skip
        assert make_study(folder, **changes).folder(cell) != before.folder(cell), changes
    assert make_study(folder, samples=99, timing_repeats=9).folder(cell) == before.folder(cell)


def test_with_psnr_the_dense_model_is_no_point(sweep, swept):
    found = list(sweep(quality="psnr", methods=SMALL)["cells"].values())
    shown = points(found, "time")
    assert "dense" not in {p.name for p in shown} and len(shown) == len(found) - 1
    assert all(p.quality < 0 for p in shown) and plot(found).axes[0].get_yscale() == "linear"


def test_fid_is_the_quality_where_it_is_measured(folder, sweep, swept, monkeypatch):
    class Network(torch.nn.Module):
        def forward(self, images):
            return (torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1),)

    monkeypatch.setattr(fid, "inception", lambda weights: Network())
    save_images(folder / "real")
    content = sweep(metrics=["fid"], weights={}, real=str(folder / "real"), methods=SMALL)
    found = by_name(content)
    assert content["quality"] == "fid" and found["dense"]["quality"] == found["dense"]["metrics"]["fid"]["value"] > 0
    assert found["dense"]["quality_error"] > 0 and found["dense"]["quality_name"] == "FID"


def test_a_killed_run_goes_on(folder, swept, tmp_path):
    """SIGKILL amid the pictures: those that were done are not made again, and the pictures are as they would be."""
    command = [sys.executable, "-m", "shiva_ext.cli", "bench", "pareto", "--model", str(folder / "model")]
    command += ["--prompts", str(folder / "prompts.txt"), "--samples", "200", "--steps", str(STEPS), "--size", "16"]
    command += ["--guidance", "3", "--dtype", "float32", "--device", "cpu", "--methods", "random", "--cache-dir"]
    process = subprocess.Popen([*command, str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    study = make_study(folder, cache_dir=tmp_path)
    dense = cells(STEPS, 3, False)[0]
    try:
        for _ in range(1200):
            if len(list(study.folder(dense).glob("*.png"))) >= 3:
                break
            assert process.poll() is None, "it ended before its pictures were made"
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = {file: file.stat().st_mtime_ns for file in study.folder(dense).glob("*.png")}
    assert 3 <= len(done) < 200
    study.samples = len(done) + 2
    files = study.pictures(dense)
    assert len(files) == len(done) + 2 and all(file.stat().st_mtime_ns == done[file] for file in done)
    reference = make_study(folder).pictures(dense)
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(files, reference, strict=False))


def test_what_a_family_refuses_is_left_out_with_the_reason(tmp_path, capsys):
    model = save_flux(tmp_path)
    arguments = ["bench", "pareto", "--model", str(model), "--samples", "2", "--steps", "3", "--size", "16"]
    arguments += ["--dtype", "float32", "--device", "cpu", "--timing-repeats", "1", "--out", str(tmp_path / "out")]
    arguments += ["--cache-dir", str(tmp_path / "cache"), "--methods", "SDTM", "IBTM", "ToMA", "--name", "flux"]
    assert main(arguments) == 0
    content = json.loads((tmp_path / "out" / "pareto_flux.json").read_text())
    assert set(by_name(content)) == {"dense", "ToMA 0.1", "ToMA 0.25", "ToMA 0.4", "ToMA 0.5"}
    assert len(content["skipped"]) == 8 and "FluxTransformerBlock has none" in content["skipped"]["SDTM 0.3"]
    assert "SDTM 0.3 is left out: " in capsys.readouterr().out
    assert "one batch of unconditional" in (tmp_path / "out" / "pareto_flux.html").read_text()
    assert main(arguments) == 0  # without running the refused again
    assert json.loads((tmp_path / "out" / "pareto_flux.json").read_text()) == content


def test_a_pipeline_that_does_not_say_whether_it_guides(tmp_path, recwarn):
    """PixArt's: IBTM needs to know, and a size is not put into a bucket."""
    content = pareto_model.run(
        str(save_pixart(tmp_path)), tmp_path / "out", samples=2, steps=3, size=24, methods=["IBTM", "random"],
        dtype="float32", device="cpu", batch_size=2, cache_dir=tmp_path / "cache", timing_repeats=1,
    )  # fmt: skip
    assert content["skipped"] == {} and len(content["cells"]) == 9
    assert not [each for each in recwarn if "does not tell whether it guides" in str(each.message)]
    assert Image.open(next((tmp_path / "cache").rglob("000001.png"))).size == (24, 24)


def test_a_merger_that_diverges_is_left_out_and_the_model_itself_is_not(folder, tmp_path, monkeypatch):
    study, generate = make_study(folder, cache_dir=tmp_path), ModelStudy.generate
    merger = next(cell for cell in cells(STEPS, 3, True) if cell.method == "ToMA")

    def diverge(study, indices, steps):
        images = generate(study, indices, steps)
        if indices[0] == 1:
            raise FloatingPointError("the sampler has diverged")
        return images

    monkeypatch.setattr(ModelStudy, "generate", diverge)
    with pytest.raises(model_study.Refused, match="diverged"):
        study.pictures(merger)
    with pytest.raises(FloatingPointError):
        study.pictures(cells(STEPS, 3, True)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "'nowhere' is not a folder here; for a repository on the hub give its revision"),
        (["--model", "{clip}"], "could not be loaded as a diffusers pipeline"),
        (["--metrics", "beauty"], "unknown metric 'beauty' in --metrics; wanted some of clip, clip-iqa, fid"),
        (["--metrics", "clip", "--weights", "clip=nowhere"], "metric 'clip' needs a CLIP model in 'nowhere'"),
        (["--metrics", "clip", "--weights", "nowhere"], "--weights is 'nowhere', wanted METRIC=PATH"),
        (["--weights", "clip={clip}"], "--weights for 'clip', which is not among --metrics"),
        (["--metrics", "image-reward", "--weights", "image-reward={clip}"], "has no ImageReward.pt"),
        (["--metrics", "fid"], "compares with real pictures; say where: --real FOLDER"),
        (["--metrics", "fid", "--real", "{clip}"], "has 0 pictures"),
        (["--real", "{clip}"], "ask for it too: --metrics fid"),
        (["--quality", "fid"], "--quality 'fid' is not measured; wanted one of psnr, ssim"),
        (["--prompts", "nowhere.txt"], "--prompts nowhere.txt is no file, wanted one with a prompt a line"),
        (["--prompts", "{empty}"], "has no prompts, wanted one a line"),
        (["--methods", "TurboMerge"], "unknown method 'TurboMerge'; wanted some of 'dense', 'fewer steps'"),
        (["--methods", "Shiva"], "'Shiva' needs --artefact FOLDER"),
        (["--artefact", "{clip}"], "is not a Shiva artefact"),
        (["--samples", "0"], "at least 1"),
        (["--dtype", "int4"], "--dtype is 'int4', wanted one of bfloat16, float16, float32"),
    ],
)
def test_what_is_wrong_is_said_on_one_line_before_any_picture(
    folder, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.setattr(ModelStudy, "generate", lambda *_: pytest.fail("a picture was made"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n\n")
    places = {"clip": str(folder / "clip"), "empty": "empty.txt"}
    arguments = [each.format(**places) for each in arguments]
    if "--model" not in arguments:
        arguments = ["--model", str(folder / "model"), *arguments]
    assert main(["bench", "pareto", *arguments]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("shiva: ") and message in error
    assert os.listdir(tmp_path) == ["empty.txt"]


def test_an_artefact_of_another_model_is_refused_before_any_picture(folder, tmp_path, monkeypatch, sweep):
    monkeypatch.setattr(ModelStudy, "generate", lambda *_: pytest.fail("a picture was made"))
    router = ShivaRouter(32, 32, 32, 5, hidden=16).eval().requires_grad_(False)
    shiva_ext.ShivaArtifact("SD3Transformer2DModel", router, RatioTable.fixed(0.6, 5)).save(tmp_path / "other")
    with pytest.raises(ValueError, match="trained for another model"):
        sweep(artefact=str(tmp_path / "other"))


def test_without_torchmetrics_no_picture_is_made(folder, monkeypatch, capsys):
    monkeypatch.setattr(ModelStudy, "generate", lambda *_: pytest.fail("a picture was made"))
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    assert main(["bench", "pareto", "--model", str(folder / "model")]) == 1
    assert "pip install 'shiva_ext[eval]'" in capsys.readouterr().err


def test_options_of_a_checkpoint_want_a_checkpoint(capsys):
    assert main(["bench", "pareto", "--steps", "4"]) == 1
    assert "--steps is for one's own checkpoint; give --model" in capsys.readouterr().err
    for option in (["--model-dir", "y"], ["--retime"], ["--seeds", "2"]):
        assert main(["bench", "pareto", "--model", "x", *option]) == 1
        assert "--model-dir, --seeds and --retime are for the testbeds" in capsys.readouterr().err


def test_the_command_that_is_stored_repeats_the_run(swept):
    words = swept["command"].split()
    assert words[:3] == ["shiva", "bench", "pareto"]
    for option, value in (("--samples", "3"), ("--steps", "4"), ("--guidance", "3.0"), ("--dtype", "float32")):
        assert words[words.index(option) + 1] == value
    assert "--seed" not in words and words[words.index("--metrics") + 1] == "clip"


def test_the_built_in_prompts_and_cells():
    assert len(set(PROMPTS)) == len(PROMPTS) >= 12
    found = cells(28, 24, True)
    assert found[0].name == "dense" and len({cell.name for cell in found}) == len(found)
    assert [cell.steps for cell in found if cell.method == "fewer steps"] == [22, 20, 17, 14]
    assert "Shiva" not in {cell.method for cell in cells(28, 24, False)}
    assert [cell.steps for cell in cells(1, 24, False) if cell.method == "fewer steps"] == []
    assert dict(next(cell for cell in found if cell.method == "ToFu").options)["depth"] == 12
