"""``shiva train`` from a pipeline's folder and a folder of images to an artefact that can be enabled."""

import json
import os
import shutil

import pytest
import torch
import yaml
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from processes import free_port, run_two

import shiva_ext
from shiva_ext.cli import main
from shiva_ext.training import checkpoint
from shiva_ext.training.config import TrainConfig, read_config
from shiva_ext.training.fit import fit, load_pipeline

from .tiny_pipeline import SIDE, save_images, save_pipeline

SETTINGS = dict(
    budget=0.5, router_steps=2, policy_steps=2, joint_steps=2, batch_size=4, micro_batches=2, adapter_rank=2,
    resolution=SIDE, log_every=1, checkpoint_every=1, table_levels=4, sample_every=3, sample_count=2,
)  # fmt: skip
CONFIG = TrainConfig(**SETTINGS)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def data(tmp_path):
    return save_images(tmp_path / "data")


def options(model, data, out, **settings) -> list[str]:
    given = dict(model=model, data=data, out=out) | settings
    return ["train", *(str(x) for name, value in given.items() for x in (f"--{name.replace('_', '-')}", value))]


def generate(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe("picture a", num_inference_steps=2, height=SIDE, width=SIDE, generator=generator, output_type="pt")[0]


def test_the_command_makes_an_artefact_that_a_pipeline_can_use(model, data, tmp_path, capsys):
    out = tmp_path / "my-shiva"
    assert main(options(model, data, out, **SETTINGS)) == 0
    text = capsys.readouterr().out
    assert "encoded 6 of 6 images" in text and "joint stage: 2 steps of 4" in text
    assert f"shiva_ext.enable(pipe, '{out}')" in text
    pipe = load_pipeline(str(model), None, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    dense = generate(pipe)
    with shiva_ext.enable(pipe, out):
        assert not torch.equal(generate(pipe), dense)
        assert shiva_ext.summary(pipe).mean_ratio == pytest.approx(0.5, abs=1 / 64)
    assert torch.equal(generate(pipe), dense)
    metadata = json.loads((out / "config.json").read_text())["metadata"]
    assert metadata["source"]["model"] == str(model) and metadata["training"]["budget"] == 0.5
    assert [entry["stage"] for entry in metadata["history"]] == ["router"] * 2 + ["policy"] * 2 + ["joint"] * 2
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and "asked for 0.5" in page and "http" not in page.split("<h2>")[2]
    for step in (3, 6):  # dense above, pruned below
        with Image.open(out / "samples" / f"step-{step:08d}.png") as grid:
            assert grid.size == (2 * SIDE, 2 * SIDE)
    assert not [path for path in out.rglob("*") if path.suffix in (".pt", ".pkl", ".bin", ".tmp")]


def test_another_method_is_trained_by_the_same_command(model, data, tmp_path, capsys):
    out = tmp_path / "my-diffcr"
    assert main(options(model, data, out, **SETTINGS, method="diffcr")) == 0
    assert "joint stage: 2 steps of 4" in capsys.readouterr().out
    pipe = load_pipeline(str(model), None, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    dense = generate(pipe)
    with shiva_ext.enable(pipe, out):
        assert not torch.equal(generate(pipe), dense)
    assert torch.equal(generate(pipe), dense)
    page = (out / "report.html").read_text()
    assert "<h2>DiffCR</h2>" in page and page.count("data:image/png;base64,") == 1
    with pytest.raises(ValueError, match="one of shiva, diffcr, dydit, sparsedit"):
        TrainConfig(method="toma")


def test_a_stopped_run_goes_on_with_resume_and_ends_the_same(model, data, tmp_path, monkeypatch):
    whole = fit(str(model), data, tmp_path / "whole", CONFIG)
    write, written = checkpoint.write, []

    def stop(*args):
        written.append(write(*args))
        if len(written) == 3:
            raise KeyboardInterrupt
        return written[-1]

    monkeypatch.setattr(checkpoint, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(str(model), data, tmp_path / "parts", CONFIG)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="holds a run already; go on with --resume"):
        fit(str(model), data, tmp_path / "parts", CONFIG)
    parts = fit(str(model), data, tmp_path / "parts", CONFIG, resume=True)
    for name in ("shiva.safetensors", "adapter/adapter_model.safetensors"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name


def test_encodings_are_computed_once_and_without_them_no_encoder_runs(model, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    fit(str(model), data, out, CONFIG)
    files = {path: path.stat().st_mtime_ns for path in (out / "encodings").iterdir()}
    assert len(files) == 7  # six images and the empty prompt
    shutil.rmtree(out / "checkpoints")
    monkeypatch.setattr(StableDiffusion3Pipeline, "encode_prompt", lambda *a, **k: pytest.fail("encoded again"))
    fit(str(model), data, out, CONFIG)
    assert {path: path.stat().st_mtime_ns for path in (out / "encodings").iterdir()} == files


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(budget=0.6), "'budget': 0.5"),
        (dict(seed=3), "is another one: config"),
        ("image", "is another one: digest"),
    ],
)
def test_resume_with_other_settings_is_refused(model, data, tmp_path, change, message):
    fit(str(model), data, tmp_path / "out", CONFIG)
    if change == "image":
        change = {}
        (data / "3.txt").write_text("another caption")
    with pytest.raises(ValueError, match=message):
        fit(str(model), data, tmp_path / "out", TrainConfig(**{**SETTINGS, **change}), resume=True)


def test_settings_that_do_not_touch_the_result_may_change(model, data, tmp_path):
    fit(str(model), data, tmp_path / "out", CONFIG)
    other = TrainConfig(**{**SETTINGS, "log_every": 2, "sample_every": 0, "keep_checkpoints": 5})
    fit(str(model), data, tmp_path / "out", other, resume=True)


def test_a_mistake_that_is_mended_does_not_need_another_folder(model, data, tmp_path, capsys):
    out = tmp_path / "out"
    (data / "5.png").write_bytes(b"no image")
    assert main(options(model, data, out, **SETTINGS)) == 1
    for path in data.glob("5.*"):
        path.unlink()
    assert main(options(model, data, out, **SETTINGS | {"budget": 0.6})) == 0


def test_adapters_are_float32_and_their_magnitudes_move(model, data, tmp_path):
    settings = SETTINGS | dict(router_steps=0, policy_steps=0, joint_steps=3, lr_adapter=1e-4, warmup=0)
    out = fit(str(model), data, tmp_path / "out", TrainConfig(**settings))
    first, _ = checkpoint.read(checkpoint.steps(out / "checkpoints")[0])
    last, _ = checkpoint.read(checkpoint.steps(out / "checkpoints")[-1])
    names = [name for name in last if name.startswith("adapter.") and "magnitude" in name]
    assert names and all(last[name].dtype == torch.float32 for name in names)
    assert all(not torch.equal(first[name], last[name]) for name in names)


def worker(rank: int, port: int, *arguments) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    fit(*arguments)


def test_two_processes_make_one_artefact_and_end_well(model, data, tmp_path):
    config = TrainConfig(**SETTINGS)
    out = tmp_path / "out"
    run_two(worker, free_port(), str(model), data, out, config)
    one = fit(str(model), data, tmp_path / "one", config)
    assert {p.name for p in (out / "encodings").iterdir()} == {p.name for p in (one / "encodings").iterdir()}
    assert (out / "report.html").is_file() and len(list((out / "samples").iterdir())) == 2
    got, wanted = (json.loads((folder / "config.json").read_text())["metadata"]["history"] for folder in (out, one))
    for a, b in zip(got, wanted, strict=True):
        assert a["stage"] == b["stage"] and a["diffusion"] == pytest.approx(b["diffusion"], rel=1e-2)  # bfloat16
    assert shiva_ext.load(out).table.mean() == pytest.approx(0.5, abs=1 / 64)


def test_what_is_wrong_is_one_line(model, data, tmp_path, capsys):
    cases = [
        (["train"], "--model, --data, --out missing"),
        (options("someone/some-model", data, tmp_path / "a"), "for a repository on the hub give its revision"),
        (options(model, tmp_path / "nowhere", tmp_path / "b"), "is not a folder"),
        (options(tmp_path, data, tmp_path / "c"), "could not be loaded as a diffusers pipeline"),
        (options(model, data, tmp_path / "d", budget=1.5), "budget is 1.5"),
        (options(model, data, tmp_path / "g", resolution=15), "resolution is 15, wanted a multiple of 2 pixels"),
        (options(model, data, tmp_path / "e", config=tmp_path / "no.yaml"), "there is no settings file"),
    ]
    for arguments, message in cases:
        assert main(arguments) == 1, arguments
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error, error
    assert not (tmp_path / "a" / "shiva.safetensors").exists()


def test_a_corrupt_image_is_named_and_the_others_encodings_are_kept(model, data, tmp_path, capsys):
    (data / "5.png").write_bytes(b"no image")
    assert main(options(model, data, tmp_path / "out", **SETTINGS)) == 1
    assert "5.png cannot be read as an image" in capsys.readouterr().err
    assert len(list((tmp_path / "out" / "encodings").iterdir())) == 5


def test_print_config_shows_every_setting_as_yaml_that_can_be_read_back(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("budget: 0.5\nlr_router: 1\nlr_policy: 1e-4\n")
    assert main(["train", "--config", str(tmp_path / "a.yaml"), "--budget", "0.7", "--print-config"]) == 0
    text = capsys.readouterr().out
    values = yaml.safe_load(text)
    assert values["budget"] == 0.7 and values["lr_router"] == 1.0 and values["adapter_rank"] == 32
    (tmp_path / "b.yaml").write_text(text)
    assert read_config(tmp_path / "b.yaml") == TrainConfig(budget=0.7, lr_router=1.0)


@pytest.mark.parametrize(
    "text, message",
    [
        ("budgets: 0.5", "unknown setting 'budgets'"),
        ("lr_router: 1e-x", "wanted a float"),
        ("budget: high", r"the setting budget is 'high' \(str\), wanted a float"),
        ("batch_size: 2.5", "wanted a int"),
        ("share_selection: 1", "wanted a bool"),
        ("- 1", "holds a list"),
        ("a: [", "is not YAML"),
        ("precision: fp8", "precision is 'fp8', wanted one of 'bf16', 'fp32'"),
        ("sharding: zero", "sharding is 'zero'"),
        ("batch_size: 6", "multiple of micro_batches"),
    ],
)
def test_a_wrong_settings_file_says_what_is_wrong(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / "a.yaml")


def test_the_papers_numbers_are_the_defaults():
    config = TrainConfig()
    got = (config.batch_size, config.lr_router, config.lr_policy, config.warmup, config.adapter_rank)
    assert got == (16, 3e-4, 1e-4, 200, 32)
    assert (config.prompt_dropout, config.feature_every, config.hidden, config.share) == (0.1, 4, 64, 2)
    assert (config.ratio_min, config.ratio_max, config.policy_noise) == (0.3, 0.95, 1.0)


def test_the_history_goes_to_tensorboard(model, data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = fit(str(model), data, tmp_path / "out", TrainConfig(**SETTINGS, tracker="tensorboard"))
    events = EventAccumulator(str(out / "shiva"))
    events.Reload()
    assert [event.step for event in events.Scalars("diffusion")] == [1, 2, 3, 4, 5, 6]


def test_a_tracker_that_is_not_there_is_named(model, data, tmp_path, monkeypatch, capsys):
    assert main(options(model, data, tmp_path / "out", **SETTINGS, tracker="comet_ml")) == 1
    assert "the tracker 'comet_ml' is not installed; pip install comet_ml" in capsys.readouterr().err


def test_pictures_of_a_run_do_not_change_it(model, data, tmp_path):
    with_pictures = fit(str(model), data, tmp_path / "a", TrainConfig(**{**SETTINGS, "sample_every": 1}))
    without = fit(str(model), data, tmp_path / "b", TrainConfig(**{**SETTINGS, "sample_every": 0}))
    assert len(list((with_pictures / "samples").iterdir())) == 6 and not (without / "samples").exists()
    assert (with_pictures / "shiva.safetensors").read_bytes() == (without / "shiva.safetensors").read_bytes()
