"""A run that is stopped at any moment and started again ends bit for bit as one that was not."""

import json
import multiprocessing
import os
import random
import shutil
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shiva_ext.training import checkpoint
from shiva_ext.training.display import PlainDisplay

from .runs import everything, finish, losses, make_trainer, next_batch


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The last bits of a sum depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def uninterrupted(one_thread, tmp_path_factory):
    trainer = finish(tmp_path_factory.mktemp("whole"))
    return everything(trainer), losses(trainer)


class Stop(BaseException):
    pass


@pytest.mark.parametrize("after", range(1, 12))
def test_a_run_stopped_after_any_step_goes_on_as_if_nothing_had_happened(after, uninterrupted, tmp_path):
    calls = 0

    def stopping(count, generator):
        nonlocal calls
        calls += 1
        if calls > 4 * after:  # four micro-batches a step
            raise Stop
        return next_batch(count, generator)

    with pytest.raises(Stop):
        make_trainer(stopping).run(tmp_path)
    torch.manual_seed(99)  # what a new process has there
    trainer = finish(tmp_path)
    wanted, history = uninterrupted
    got = everything(trainer)
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []
    assert losses(trainer) == history


def test_a_run_that_is_done_stays_as_it_is(uninterrupted, tmp_path):
    finish(tmp_path)
    trainer = finish(tmp_path, source=lambda *args: pytest.fail("trained again"))
    assert all(torch.equal(value, uninterrupted[0][name]) for name, value in everything(trainer).items())


def test_a_run_from_before_a_setting_was_there_goes_on(uninterrupted, tmp_path):
    """A missing setting stands for its default."""
    trainer = make_trainer()
    trainer.run_stage("router", 3, checkpoints=tmp_path)
    trainer.close()
    (record,) = tmp_path.rglob("state.json")
    content = json.loads(record.read_text())
    for name in ("anneal_to", "method"):
        del content["config"][name]
    record.write_text(json.dumps(content))
    assert losses(finish(tmp_path)) == uninterrupted[1]


def test_checkpoints_come_when_they_are_due(tmp_path):
    finish(tmp_path, keep_checkpoints=10)
    steps = [int(path.name.removeprefix("step-")) for path in checkpoint.steps(tmp_path)]
    assert steps == [3, 4, 7, 8, 11, 12]  # every third of a stage, and its end


def test_other_settings_are_refused(tmp_path):
    finish(tmp_path)
    with pytest.raises(ValueError, match=r"started with other settings: budget 0.6 \(now 0.5\)"):
        make_trainer(budget=0.5).run(tmp_path, resume=True)


def save_result(folder: Path, inside: Path) -> None:
    """A process's whole work; saves take a while, so that some are killed inside one."""
    torch.set_num_threads(1)
    write = checkpoint.save_file

    def slow(tensors, path):
        inside.touch()
        write(tensors, path)
        time.sleep(0.02)
        path.write_bytes(path.read_bytes()[:-1])  # not yet whole
        time.sleep(0.02)
        write(tensors, path)
        inside.unlink()

    checkpoint.save_file = slow
    trainer = finish(folder / "checkpoints")
    save_file(everything(trainer), folder / "result.safetensors")


def test_kill_9_at_twenty_random_moments(uninterrupted, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # where the server finds this module
    context = multiprocessing.get_context("forkserver")  # forks that begin with torch imported, and nothing run
    context.set_forkserver_preload(["torch", __name__])
    stage, folder, generator = tmp_path / "inside", tmp_path / "run", random.Random(0)

    def start(place: Path) -> multiprocessing.Process:
        place.mkdir(exist_ok=True)
        stage.unlink(missing_ok=True)
        process = context.Process(target=save_result, args=(place, stage))
        process.start()
        return process

    for _ in range(2):  # the first starts the server
        begun = time.monotonic()
        process = start(tmp_path / "timed")
        process.join()
        shutil.rmtree(tmp_path / "timed")
        assert process.exitcode == 0
    whole, inside = time.monotonic() - begun, 0
    for number in range(20):
        process = start(folder)
        if number % 4 == 3:  # wait for a save, then somewhere in it
            while not stage.exists() and process.is_alive():
                time.sleep(0.001)
            time.sleep(generator.uniform(0, 0.04))
        else:
            time.sleep(generator.uniform(0.05, 1.0) * whole)
        inside += stage.exists()
        process.kill()
        process.join()
        if (folder / "result.safetensors").exists():  # it came to its end: once more from the start
            check(folder, uninterrupted[0])
            folder = tmp_path / f"run{number}"
    process = start(folder)
    process.join()
    assert process.exitcode == 0
    check(folder, uninterrupted[0])
    assert inside >= 3


def check(folder: Path, wanted: dict[str, torch.Tensor]) -> None:
    got = load_file(folder / "result.safetensors")
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []


def test_a_full_disk_stops_the_run_and_a_resume_goes_on(uninterrupted, tmp_path, monkeypatch):
    write = checkpoint.save_file

    def full(tensors, path):
        if any((path.parent.parent / f"step-{n:08d}").exists() for n in (4,)):
            raise OSError(28, "No space left on device")
        write(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="step 7 could not be written"):
        finish(tmp_path)
    monkeypatch.undo()
    assert checkpoint.latest(tmp_path)[1]["step"] == 4
    got = everything(finish(tmp_path))
    assert all(torch.equal(got[name], value) for name, value in uninterrupted[0].items())


def test_a_damaged_newest_checkpoint_costs_some_steps_and_nothing_else(uninterrupted, tmp_path):
    finish(tmp_path)
    path = checkpoint.steps(tmp_path)[-1] / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = finish(tmp_path)
    assert any("cannot be read" in str(w.message) for w in caught)
    assert all(torch.equal(value, uninterrupted[0][name]) for name, value in everything(trainer).items())


def nan_at(steps):
    """A source whose samples of these steps are not finite."""
    calls = 0

    def source(count, generator):
        nonlocal calls
        batch, step = next_batch(count, generator), calls // 4
        calls += 1
        return batch._replace(latents=batch.latents * float("nan")) if step in steps else batch

    return source


def test_a_step_without_a_finite_loss_is_skipped_and_told(capsys):
    trainer = make_trainer(nan_at({1, 6, 9}))
    trainer.display = PlainDisplay()
    trainer.run()
    assert all(value.isfinite().all() for value in everything(trainer).values())
    text = capsys.readouterr().err
    assert "step 2 of the router stage has no finite gradient: skipped (1 in a row" in text
    assert text.count("skipped") == 3 and trainer.bad_steps == 0
    assert all(value == value for entry in trainer.history for value in entry.values())


def test_a_skipped_step_changes_nothing():
    trainer = make_trainer(nan_at({2}), router_steps=3, policy_steps=0, joint_steps=0)
    other = make_trainer(router_steps=3, policy_steps=0, joint_steps=0)
    seen = {}
    skip = trainer._skip
    trainer._skip = lambda *args: (seen.update(everything(trainer)), skip(*args))
    trainer.run()
    assert seen and all(torch.equal(value, seen[name]) for name, value in everything(trainer).items())
    other.run()
    assert any(not torch.equal(value, seen[name]) for name, value in everything(other).items())


def test_too_many_in_a_row_stop_the_run_and_keep_the_last_checkpoint(tmp_path):
    trainer = make_trainer(nan_at(range(5, 100)), max_bad_steps=2)
    with pytest.raises(
        FloatingPointError, match="step 4 of the policy stage has no finite gradient, nor had the 2 before"
    ):
        trainer.run(tmp_path)
    assert checkpoint.latest(tmp_path)[1]["step"] in (4, 7)
    got = checkpoint.latest(tmp_path)[0]
    assert all(value.isfinite().all() for value in got.values())


def test_a_folder_with_a_run_is_not_started_in_again(tmp_path):
    finish(tmp_path)
    with pytest.raises(ValueError, match="holds a run already; resume it"):
        make_trainer().run(tmp_path)


def test_scores_that_are_not_finite_are_a_bad_step_and_the_pass_goes_on_to_its_end():
    trainer = make_trainer(max_bad_steps=0)
    torch.nn.init.constant_(next(trainer.router.parameters()), float("nan"))
    calls = []
    trainer.transformer.transformer_blocks[-1].register_forward_hook(lambda *args: calls.append(1))
    with pytest.raises(FloatingPointError, match="no finite gradient"):
        trainer.run_stage("router", 1)
    assert len(calls) == 2 * 4  # teacher and student, four micro-batches: no process is left waiting
