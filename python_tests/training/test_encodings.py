"""Encodings are computed once, checked when read, and computed again when they are damaged."""

import errno
import os

import pytest
import torch

from shiva_ext.training import encodings
from shiva_ext.training.data import find_samples
from shiva_ext.training.encodings import CachedSource, Encoder, EncodingCache

from .tiny_pipeline import save_images


@pytest.fixture
def samples(tmp_path):
    return find_samples(save_images(tmp_path / "data"))


IDENTITY = {"model": "a"}


def make_encoder(log: list) -> Encoder:
    def prompts(captions):
        log.extend(captions)
        lengths = [len(c) for c in captions]
        tokens = torch.zeros(len(captions), max(lengths, default=1) or 1, 4)
        for i, c in enumerate(captions):
            tokens[i] = len(c)
        return dict(encoder_hidden_states=tokens, mask=torch.ones(tokens.shape[:2], dtype=torch.long))

    return Encoder(lambda pixels: pixels.mean(dim=1, keepdim=True), prompts, 8)


def test_each_is_computed_once_and_again_if_damaged(samples, tmp_path):
    log = []
    encoder = make_encoder(log)
    cache = EncodingCache(tmp_path / "cache", IDENTITY)
    assert cache.missing(samples) == [None, *samples]
    cache.fill(samples, encoder)
    assert sorted(log) == ["", *(s.caption for s in samples)] and cache.missing(samples) == []
    log.clear()
    cache.fill(samples, encoder)
    assert log == []
    path = cache.path(samples[2])
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    cache.path(samples[4]).write_bytes(b"")
    cache.path(samples[5]).unlink()
    assert cache.missing(samples) == [samples[2], samples[4], samples[5]]
    cache.fill(samples, encoder)
    assert log == [samples[i].caption for i in (2, 4, 5)] and cache.missing(samples) == []


def test_another_image_caption_model_or_size_is_another_encoding(samples, tmp_path):
    cache = EncodingCache(tmp_path / "cache", {"model": "a", "resolution": 8})
    path, empty = cache.path(samples[0]), cache.path(None)
    samples[0].image.with_suffix(".txt").write_text("another")
    assert cache.path(find_samples(samples[0].image.parent)[0]) != path
    for identity in ({"model": "b", "resolution": 8}, {"model": "a", "resolution": 16}):
        other = EncodingCache(tmp_path / "cache", identity)
        assert other.path(samples[0]) != path and other.path(None) != empty
    samples[0].image.write_bytes(samples[1].image.read_bytes())
    assert EncodingCache(cache.folder, {"model": "a", "resolution": 8}).path(samples[0]) != path


@pytest.mark.parametrize("name", ["save_file", "flush"])
def test_a_full_disk_keeps_what_was_there(samples, tmp_path, monkeypatch, name):
    log = []
    encoder = make_encoder(log)
    cache = EncodingCache(tmp_path / "cache", IDENTITY)
    original, calls = getattr(encodings, name), []

    def full(*args):
        calls.append(1)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args)

    monkeypatch.setattr(encodings, name, full)
    with pytest.raises(OSError, match="No space left on device.*make room"):
        cache.fill(samples, encoder, batch_size=2)
    monkeypatch.undo()
    assert len(list((tmp_path / "cache").iterdir())) == 3
    cache.fill(samples, encoder)
    assert cache.missing(samples) == []


def test_batches_depend_on_the_generator_alone_and_drop_prompts(samples, tmp_path):
    encoder = make_encoder([])
    cache = EncodingCache(tmp_path / "cache", IDENTITY)
    cache.fill(samples, encoder, batch_size=1)
    source = CachedSource(cache, samples, prompt_dropout=0.25)
    first, second = (source(64, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first.latents, second.latents) and first.latents.shape == (64, 1, 8, 8)
    tokens, mask = first.conditions["encoder_hidden_states"], first.conditions["mask"]
    assert torch.equal(tokens, second.conditions["encoder_hidden_states"])
    assert tokens.shape == (64, 9, 4) and mask.shape == (64, 9)  # "picture a"; the empty prompt is filled up
    dropped = mask.sum(dim=1) == 1
    assert 6 <= dropped.sum() <= 28 and (tokens[dropped] == 0).all() and (tokens[~dropped] == 9).all()
    other = source(64, torch.Generator().manual_seed(6))
    assert not torch.equal(first.latents, other.latents)
    half = CachedSource(cache, samples, 0.0, torch.bfloat16)(2, torch.Generator())
    assert half.latents.dtype == torch.float32 and half.conditions["encoder_hidden_states"].dtype == torch.bfloat16


def test_a_damaged_encoding_in_the_middle_of_a_run_is_named(samples, tmp_path):
    encoder = make_encoder([])
    cache = EncodingCache(tmp_path / "cache", IDENTITY)
    with pytest.raises(ValueError, match="missing or damaged; start again"):
        CachedSource(cache, samples, 0.0)
    cache.fill(samples, encoder)
    source = CachedSource(cache, samples, 0.0)
    for sample in samples:
        cache.path(sample).write_bytes(b"x")
    with pytest.raises(ValueError, match="missing or damaged; start again"):
        source(1, torch.Generator())


def test_batches_are_the_same_whatever_is_missing_and_whoever_computes_them(samples, tmp_path, monkeypatch):
    def encoder(log):
        def images(pixels):
            log.append(len(pixels))
            return pixels.mean(dim=1, keepdim=True) + pixels.mean()  # depends on the batch, as the last bits do

        return Encoder(images, make_encoder([]).prompts, 8)

    def content(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    whole, log = EncodingCache(tmp_path / "whole", IDENTITY), []
    whole.fill(samples, encoder(log), batch_size=4)
    assert log == [4, 2]
    parts, log = EncodingCache(tmp_path / "parts", IDENTITY), []
    parts.fill(samples, encoder(log), batch_size=4)
    for i in (1, 2, 5):
        parts.path(samples[i]).unlink()
    parts.fill(samples, encoder(log), batch_size=4)
    assert log == [4, 2, 4, 2] and content(tmp_path / "parts") == content(tmp_path / "whole")
    many = EncodingCache(tmp_path / "many", IDENTITY)
    monkeypatch.setattr(encodings, "world", lambda: 2)
    for rank in (1, 0):  # the second process is faster
        monkeypatch.setattr(encodings, "rank", lambda rank=rank: rank)
        many.fill(samples, encoder([]), batch_size=4)
    assert content(tmp_path / "many") == content(tmp_path / "whole")
