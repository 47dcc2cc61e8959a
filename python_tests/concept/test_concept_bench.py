"""``shiva train concepts`` and ``shiva bench concepts`` from end to end on a short text."""

import json
import math

import pytest
import torch

from shiva_ext.cli import main
from shiva_ext.concept import ConceptConfig, ConceptModel
from shiva_ext.testbed import book

SMALL = ["--steps", "2", "--batch-size", "2", "--length", "32", "--width", "32", "--middle", "1"]


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "book.txt"
    file.write_bytes(bytes(range(32, 127)) * 1100)
    return str(file)


def test_every_variant_is_trained_and_measured(text, tmp_path, capsys):
    folder, out = str(tmp_path / "concepts"), tmp_path / "out"
    assert main(["train", "concepts", "--out", folder, "--text", text, *SMALL]) == 0
    arguments = ["bench", "concepts", "--concepts", folder, "--text", text, "--windows", "4", "--repeats", "1"]
    assert main([*arguments, "--out", str(out)]) == 0
    shown, rows = capsys.readouterr().out, json.loads((out / "concepts.json").read_text())["rows"]
    assert len(rows) == len(book.VARIANTS) and (out / "concepts.png").stat().st_size > 1000
    found = {row["name"]: row for row in rows}
    assert all(name in shown for name in found)
    assert found["without concepts"]["tokens_a_concept"] == 1 and found["without concepts"]["apart"] == 0
    assert found["R = 2, fixed chunks"]["tokens_a_concept"] == 2
    assert found["R = 1.5, fixed chunks"]["tokens_a_concept"] == pytest.approx(32 / 21)


def test_the_same_windows_for_every_variant(text, tmp_path, monkeypatch):
    seen, windows = [], book.windows
    monkeypatch.setattr(book, "windows", lambda *args: seen.append(args[2].tolist()) or windows(*args))
    assert (
        main(["train", "concepts", "--out", str(tmp_path / "c"), "--text", text, *SMALL, "--variants", "none", "r2"])
        == 0
    )
    assert seen[:2] == seen[2:] and len(seen) == 4 and seen[0] != seen[1]


def test_bits_a_byte_of_a_model_that_knows_nothing():
    model = ConceptModel(ConceptConfig(width=32, middle=1, ratio=None)).eval()
    with torch.no_grad():
        model.head.weight.zero_()
    bits, ratio = book.bits_per_byte(model, torch.randint(256, (500,), dtype=torch.uint8), 16, 5, 2)
    assert bits == pytest.approx([math.log2(256)] * 5, rel=1e-3) and ratio == 1


def test_the_last_pages_are_held_out_and_verse_numbers_are_not_text(tmp_path, monkeypatch, capsys):
    file = tmp_path / "book.txt"
    file.write_bytes(b"a" * 95_000 + b"b" * 5_000)
    train, held_out = book.load_book(file)
    assert bytes(train.tolist()) == b"a" * 95_000 and bytes(held_out.tolist()) == b"b" * 5_000
    program = tmp_path / "bible"
    program.write_text("#!/bin/sh\nyes 'Ge1:1 In the beginning' | head -n 7000\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert bytes(book.load_book()[0][:34].tolist()) == b"In the beginning\nIn the beginning\n"
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert main(["train", "concepts", "--out", str(tmp_path / "c")]) == 1
    assert "apt-get install bible-kjv" in capsys.readouterr().err
    file.write_bytes(b"short")
    with pytest.raises(ValueError, match="the text has 5 bytes, wanted 100,000 or more"):
        book.load_book(file)


def test_what_is_missing_or_unknown_is_said(text, tmp_path, capsys):
    assert main(["bench", "concepts", "--concepts", str(tmp_path / "none"), "--text", text]) == 1
    assert "run 'shiva train concepts --out" in capsys.readouterr().err
    assert main(["train", "concepts", "--out", str(tmp_path / "c"), "--text", text, "--variants", "magic"]) == 1
    assert "unknown magic; there are none, r2" in capsys.readouterr().err
