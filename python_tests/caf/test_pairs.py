"""Pairs: what a chunk depends on, going on after a stop, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from shiva_ext.caf import make_pairs
from shiva_ext.caf.fashion import fashion_pairs
from shiva_ext.caf.pairs import load_pairs
from shiva_ext.testbed.model import load_model
from shiva_ext.testbed.sampling import generate

SHAPE, TEACHER = (1, 4, 4), {"model": "abc", "steps": 3, "guidance": 2.0}


def teach(labels, noise):
    return noise.tanh() + labels.view(-1, 1, 1, 1)


def labels(count):
    return torch.arange(count) % 3


def make(folder, count=10, sample=teach, teacher=TEACHER, seed=0, chunk=4, shape=SHAPE):
    return make_pairs(folder, count, sample, labels, shape, teacher, seed, chunk)


def assert_same(pairs, other):
    assert all(torch.equal(a, b) for a, b in zip(pairs[:3], other[:3], strict=True))


def test_data_are_what_the_teacher_makes_of_the_noise(tmp_path):
    pairs = make(tmp_path)
    assert pairs.noise.shape == pairs.data.shape == (10, *SHAPE) and pairs.labels.tolist() == labels(10).tolist()
    torch.testing.assert_close(pairs.data, teach(pairs.labels, pairs.noise))
    assert pairs.noise.unique().numel() == pairs.noise.numel()
    assert abs(pairs.noise.mean()) < 0.3 and 0.7 < pairs.noise.std() < 1.3
    assert_same(pairs, load_pairs(tmp_path, 10))
    assert len(load_pairs(tmp_path).noise) == 12  # whole chunks are there


def test_more_pairs_leave_the_first_ones_as_they_are(tmp_path):
    few, more = make(tmp_path, 5), make(tmp_path, 10)
    assert torch.equal(more.data[:5], few.data)
    assert_same(make(tmp_path / "at once"), more)
    assert_same(make(tmp_path, 5, sample=lambda *_: pytest.fail("made again")), few)


def test_a_stopped_making_goes_on_with_what_is_missing(tmp_path):
    made = []

    def stopping(some, noise):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(len(some))
        return teach(some, noise)

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, sample=stopping)
    calls = []
    pairs = make(tmp_path, sample=lambda *given: calls.append(1) or teach(*given))
    assert len(calls) == 1
    assert_same(pairs, make(tmp_path / "whole"))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(teacher=TEACHER | {"model": "other"}), "the pairs in .* were made otherwise: teacher .*abc.*other"),
        (dict(teacher=TEACHER | {"guidance": 3.0}), "teacher"),
        (dict(teacher=TEACHER | {"steps": 4}), "teacher"),
        (dict(seed=1), r"seed 0 \(now 1\)"),
        (dict(chunk=5), r"chunk 4 \(now 5\)"),
        (dict(shape=(1, 2, 8)), "shape"),
    ],
)
def test_pairs_of_another_teacher_are_refused(tmp_path, change, message):
    make(tmp_path)
    before = sorted((file.name, file.stat().st_mtime_ns) for file in tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **change)
    assert sorted((file.name, file.stat().st_mtime_ns) for file in tmp_path.iterdir()) == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_teacher_that_diverges_leaves_no_file(tmp_path, bad):
    def diverging(some, noise):
        data = teach(some, noise)
        data[1, 0, 0, 0] = bad
        return data

    with pytest.raises(ValueError, match="NaN or infinite values in 1 of 4 pairs"):
        make(tmp_path, sample=diverging)
    assert not list(tmp_path.glob("pairs-*"))
    with pytest.raises(ValueError, match=r"is \[4, 1, 2, 4\], wanted \[4, 1, 4, 4\]"):
        make(tmp_path, sample=lambda some, noise: noise[:, :, :2])


def test_nan_in_a_file_and_damaged_files_are_refused_by_name(tmp_path):
    make(tmp_path)
    file = tmp_path / "pairs-000001.safetensors"
    part = load_file(file)
    part["noise"][2] = float("nan")
    save_file(part, file)
    with pytest.raises(ValueError, match="pairs-000001.safetensors: noise has NaN or infinite values in 1 of 4"):
        load_pairs(tmp_path)
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match="pairs-000001.safetensors is damaged .* delete it"):
        load_pairs(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="lacks pairs-000001.safetensors for 10 pairs"):
        load_pairs(tmp_path, 10)
    assert_same(make(tmp_path), make(tmp_path / "whole"))


def test_a_folder_without_pairs_says_how_to_make_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="make_pairs or 'shiva train caf'"):
        load_pairs(tmp_path)
    for count, chunk in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="wanted at least 1 of both"):
            make(tmp_path, count, chunk=chunk)


def test_a_batch_depends_on_the_generator_alone(tmp_path):
    pairs = make(tmp_path)
    drawn = [pairs.batch(6, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    noise, data, some = drawn[0]
    torch.testing.assert_close(data, teach(some, noise))
    assert len(make(tmp_path / "one", 1, chunk=1).batch(3, torch.Generator())[0]) == 3


def test_the_testbeds_pairs_are_its_guided_samples(tmp_path, model_dir):
    pairs = fashion_pairs(tmp_path, 3, model_dir, steps=2, chunk=2)
    transformer, prompts = load_model(model_dir, torch.bfloat16)
    wanted = generate(transformer, prompts, pairs.labels, pairs.noise, 2, 2.0)
    torch.testing.assert_close(pairs.data, wanted, rtol=0.1, atol=0.1)
    assert pairs.labels.tolist() == [0, 1, 2]
    identity = json.loads((tmp_path / "pairs.json").read_text())
    assert identity["teacher"]["steps"] == 2 and identity["teacher"]["guidance"] == 2.0
    with pytest.raises(ValueError, match="were made otherwise"):
        fashion_pairs(tmp_path, 3, steps=2, chunk=2)  # the model that ships
