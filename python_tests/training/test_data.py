"""A folder of images with captions, and everything that can be wrong with one."""

import json

import pytest
import torch
from PIL import Image

from shiva_ext.training.data import find_samples, load_image


def picture(path, size=(8, 8), color=(255, 0, 0), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return path


def test_captions_beside_images(tmp_path):
    for name, text in (("b.jpg", "a blue\n"), ("a.png", " an apple "), ("more/c.webp", "")):
        picture(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(text)
    (tmp_path / ".DS_Store").write_text("x")
    found = [(str(s.image.relative_to(tmp_path)), s.caption) for s in find_samples(tmp_path)]
    assert found == [("a.png", "an apple"), ("b.jpg", "a blue"), ("more/c.webp", "")]


def test_captions_in_a_list(tmp_path):
    for name in ("x.png", "sub/y.png", "unused.png"):
        picture(tmp_path / name)
    lines = [{"file_name": "x.png", "text": "one"}, {"file_name": "sub/y.png", "text": "two", "more": 1}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert [s.caption for s in find_samples(tmp_path)] == ["two", "one"]


def test_a_missing_an_empty_and_a_half_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        find_samples(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no images"):
        find_samples(tmp_path)
    (tmp_path / "a.txt").write_text("an apple")
    with pytest.raises(FileNotFoundError, match=r"1 captions without an image \(first: a.txt\)"):
        find_samples(tmp_path)
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    with pytest.raises(FileNotFoundError, match=r"1 images without a caption \(first: b.png\)"):
        find_samples(tmp_path)


@pytest.mark.parametrize(
    "line, kind, message",
    [
        ("{", ValueError, "line 2 of"),
        ("[]", ValueError, "line 2 of"),
        ('{"file_name": "a.png"}', ValueError, "'text'"),
        ('{"file_name": 3, "text": "x"}', ValueError, "must be strings"),
        ('{"file_name": "b.png", "text": "x"}', FileNotFoundError, "a caption without its image b.png"),
        ('{"file_name": "a.png", "text": "x"}', ValueError, "second caption"),
        ('{"file_name": "../secret.png", "text": "x"}', ValueError, "outside the folder"),
    ],
)
def test_a_bad_line_in_the_list_is_named(tmp_path, line, kind, message):
    folder = tmp_path / "data"
    picture(folder / "a.png")
    picture(tmp_path / "secret.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "good"}\n' + line + "\n")
    with pytest.raises(kind, match=message):
        find_samples(folder)


def test_an_image_becomes_its_middle_square(tmp_path):
    image = Image.new("RGB", (24, 8), (255, 0, 0))
    image.paste((0, 0, 255), (8, 0, 16, 8))
    image.save(tmp_path / "wide.png")
    pixels = load_image(tmp_path / "wide.png", 4)
    assert pixels.shape == (3, 4, 4) and pixels.dtype == torch.float32
    assert torch.equal(pixels, torch.tensor([-1.0, -1.0, 1.0]).view(3, 1, 1).expand(3, 4, 4))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_modes_become_rgb(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new(mode, (8, 8)).save(path)
    assert load_image(path, 8).shape == (3, 8, 8)


@pytest.mark.parametrize("damage", ["empty", "text", "truncated"])
def test_a_damaged_image_is_named(tmp_path, damage):
    path = tmp_path / "a.png"
    Image.effect_noise((64, 64), 50).save(path)
    content = {"empty": b"", "text": b"no image at all", "truncated": path.read_bytes()[:900]}[damage]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.png cannot be read as an image"):
        load_image(path, 8)


def test_two_images_for_one_caption_are_named(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("an apple")
    with pytest.raises(ValueError, match=r"a\.png and a\.jpg in .* would share a caption"):
        find_samples(tmp_path)


def test_a_picture_that_was_turned_by_the_camera_is_turned_back(tmp_path):
    image = Image.new("RGB", (8, 8), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 8, 4))
    exif = image.getexif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "a.png", exif=exif)
    pixels = load_image(tmp_path / "a.png", 8)
    assert pixels[2, 7, 0] == 1 and pixels[0, 0, 0] == 1  # blue is at the bottom


def test_an_image_too_large_to_be_true_is_named(tmp_path, monkeypatch):
    picture(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match=r"a\.png cannot be read as an image"):
        load_image(tmp_path / "a.png", 8)
