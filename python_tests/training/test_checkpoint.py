"""Checkpoints are whole or absent, and checked when they are read."""

import errno
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from shiva_ext.training import checkpoint

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3), "c": torch.randn(5, dtype=torch.float64)}


def write(folder, step, **options):
    return checkpoint.write(folder, step, TENSORS, {"stage": "router", "values": [0.1, 1e-300]}, **options)


def test_what_is_written_is_read(tmp_path):
    write(tmp_path, 3)
    tensors, record = checkpoint.latest(tmp_path)
    assert tensors.keys() == TENSORS.keys() and all(torch.equal(tensors[k], TENSORS[k]) for k in TENSORS)
    assert record["step"] == 3 and record["values"] == [0.1, 1e-300]
    assert sorted(path.name for path in (tmp_path / "step-00000003").iterdir()) == ["state.json", "state.safetensors"]


def test_the_last_ones_are_kept(tmp_path):
    for step in (5, 10, 100, 1000):
        write(tmp_path, step, keep=2)
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-00000100", "step-00001000"]
    assert checkpoint.latest(tmp_path)[1]["step"] == 1000


def test_the_same_step_again_replaces_it(tmp_path):
    write(tmp_path, 5)
    checkpoint.write(tmp_path, 5, {"a": torch.zeros(1)}, {})
    assert checkpoint.latest(tmp_path)[0].keys() == {"a"}


def test_none_is_none(tmp_path):
    assert checkpoint.latest(tmp_path) is None


@pytest.mark.parametrize("damage", ["flip", "truncate", "no record", "no tensors", "record cut", "other tensors"])
def test_a_damaged_one_is_passed_over_for_the_one_before(tmp_path, damage):
    write(tmp_path, 1)
    folder = write(tmp_path, 2)
    tensors, record = folder / "state.safetensors", folder / "state.json"
    if damage == "flip":
        content = bytearray(tensors.read_bytes())
        content[-3] ^= 16
        tensors.write_bytes(content)
    elif damage == "truncate":
        tensors.write_bytes(tensors.read_bytes()[:-4])
    elif damage == "no record":
        record.unlink()
    elif damage == "no tensors":
        tensors.unlink()
    elif damage == "record cut":
        record.write_text(record.read_text()[:20])
    else:
        save_file({"a": torch.zeros(1)}, tensors)
    with pytest.warns(UserWarning, match="step-00000002 cannot be read"):
        assert checkpoint.latest(tmp_path)[1]["step"] == 1


def test_if_none_can_be_read_it_says_so(tmp_path):
    (write(tmp_path, 1) / "state.safetensors").unlink()
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="none of the 1 checkpoints"):
        checkpoint.latest(tmp_path)


def test_a_later_format_is_refused(tmp_path):
    path = write(tmp_path, 1) / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(ValueError, match="format 2, this version reads 1; update"):
        checkpoint.read(path.parent)


@pytest.mark.parametrize("name", ["save_file", "flush"])
def test_a_full_disk_leaves_the_last_good_one(tmp_path, monkeypatch, name):
    write(tmp_path, 1)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, name, full)
    with pytest.raises(OSError, match="step 2 could not be written.*No space left.*--resume"):
        write(tmp_path, 2)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.latest(tmp_path)[1]["step"] == 1


def test_what_a_killed_write_left_is_removed_and_never_read(tmp_path):
    write(tmp_path, 1)
    unfinished = tmp_path / ".unfinished-123"
    unfinished.mkdir()
    (unfinished / "state.safetensors").write_bytes(b"half")
    assert checkpoint.latest(tmp_path)[1]["step"] == 1
    assert not unfinished.exists()


def test_nothing_in_it_is_unpickled(tmp_path, monkeypatch):
    write(tmp_path, 1)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("unpickled"))
    assert checkpoint.latest(tmp_path) is not None


def test_an_optimizers_state_goes_there_and_back():
    def make():
        torch.manual_seed(0)
        params = [
            torch.nn.Parameter(torch.randn(3)),
            torch.nn.Parameter(torch.randn(2, 2)),
            torch.nn.Parameter(torch.zeros(1)),
        ]
        return params, torch.optim.AdamW([dict(params=params[:1], lr=0.1), dict(params=params[1:], lr=0.2)])

    def step(params, optimizer):
        (params[0].square().sum() + params[1].square().sum()).backward()  # the third gets no gradient
        optimizer.step()
        optimizer.zero_grad()

    params, optimizer = make()
    for _ in range(3):
        step(params, optimizer)
    others, fresh = make()
    for p, q in zip(others, params, strict=True):
        p.data.copy_(q)
    checkpoint.unflatten(fresh, {k: v.clone() for k, v in checkpoint.flatten(optimizer).items()})
    step(params, optimizer)
    step(others, fresh)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_a_new_checkpoint_is_never_the_one_that_is_removed(tmp_path):
    for step in (11, 12):
        write(tmp_path, step)
    assert write(tmp_path, 3, keep=2).is_dir()
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-00000003", "step-00000012"]
    assert write(tmp_path, 4, keep=1).is_dir() and len(checkpoint.steps(tmp_path)) == 1
