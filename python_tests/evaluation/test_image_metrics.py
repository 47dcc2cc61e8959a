"""The metrics of pictures on tiny weights: against their definitions, and what is said when something is missing."""

import sys
import types
from urllib.error import URLError

import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch import nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor

from evaluation.tiny_weights import pictures, save_clip, save_reward
from shiva_ext.evaluation import fid
from shiva_ext.evaluation.fid import Fid
from shiva_ext.evaluation.image_metric import fingerprint, mean_of
from shiva_ext.evaluation.image_metrics import METRICS, load_metric
from shiva_ext.evaluation.metrics import bootstrap_distances, frechet_distance, gaussian

PROMPTS = ["a cat", "b", "red dog", "a picture that has more letters than the text encoder takes"]


class TinyExtractor(nn.Module):
    """Features of a picture in the form of torch-fidelity's networks: uint8 of any size to a tuple."""

    def forward(self, images):
        small = F.adaptive_avg_pool2d(images.float() / 255, (2, 3)).flatten(1)
        return (torch.cat([small, small.square(), small.prod(1, keepdim=True)], 1),)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    return save_reward(tmp_path_factory.mktemp("reward"))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    for i in range(12):
        sub = folder / ("more" if i % 2 else ".")
        sub.mkdir(exist_ok=True)
        Image.fromarray(pictures(12, 30 + i, 20)[i].permute(1, 2, 0).numpy()).save(sub / f"{i}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))


def clip_features(folder, images, prompts):
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    read = processor(text=prompts, images=list(images), padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        found = model(**read)
    return F.normalize(found.image_embeds, dim=-1), F.normalize(found.text_embeds, dim=-1)


def test_clip_score_is_the_cosine_of_picture_and_prompt(clip):
    image, text = clip_features(clip, pictures(), PROMPTS)
    wanted = (100 * (image * text).sum(-1)).clamp_min(0)
    assert wanted.count_nonzero() >= 2 and wanted.std() > 1
    torch.testing.assert_close(load_metric("clip", clip).scores(pictures(), PROMPTS), wanted, atol=1e-3, rtol=1e-4)


def test_clip_iqa_is_the_share_of_the_good_photo(clip):
    image, text = clip_features(clip, pictures(2), ["Good photo.", "Bad photo."])
    wanted = (100 * image @ text.T).softmax(-1)[:, 0]
    found = load_metric("clip-iqa", clip).scores(pictures(2), ["a", "b"])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
    assert load_metric("clip-iqa", clip).scores(pictures(1), ["a"]).shape == (1,)


def test_a_mean_does_not_depend_on_batches_and_has_its_interval(clip):
    metric, images = load_metric("clip", clip), pictures()
    values = metric.scores(images, PROMPTS).double()
    for size in (1, 3):
        batches = [(images[i : i + size], PROMPTS[i : i + size]) for i in range(0, 4, size)]
        found = metric.measure(batches)
        assert found.value == pytest.approx(values.mean().item(), abs=1e-5)
        assert found.error == pytest.approx(mean_of(values).error, abs=1e-5)


def test_an_interval_is_that_of_the_mean_and_resamples_are_common():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    found = mean_of(values)
    assert found.error == pytest.approx(1.96 * values.std().item() / 20, rel=0.2) and len(found.draws) == 100
    assert mean_of(values[:1]).error == 0
    assert mean_of(values + 3).draws == pytest.approx([each + 3 for each in found.draws])


def test_image_reward_is_what_its_package_gives(reward):
    """The numbers were computed by image-reward 1.5's own classes, in transformers 4.30, from the same weights."""
    prompts = ["a red cat on the mat", "blue dog"]
    long = "a cat, the dog on a mat, on the red mat, a blue cat on the blue mat, a dog on the mat, red on the red mat "
    prompts.append(long + "on the dog cat mat")  # more tokens than it reads
    found = load_metric("image-reward", reward).scores(pictures(3), prompts)
    torch.testing.assert_close(found, torch.tensor([0.4573345, 2.7696717, -0.6474325]), atol=2e-5, rtol=0)


def test_fid_is_the_frechet_distance_of_the_features(real):
    metric, images = Fid(None, "cpu", real, extractor=TinyExtractor()), pictures(9)
    found = metric.measure([(images[:5], [""] * 5), (images[5:], [""] * 4)])
    features = TinyExtractor()(images)[0].double()
    mean, covariance = gaussian(features)
    wanted = frechet_distance(mean, covariance, metric.mean, metric.covariance)
    assert found.value == pytest.approx(wanted, rel=1e-9)
    root = torch.from_numpy(sqrtm((covariance @ metric.covariance).numpy()).real)
    wanted = (mean - metric.mean).square().sum() + (covariance + metric.covariance - 2 * root).trace()
    assert found.value == pytest.approx(wanted.item(), rel=1e-4)


@pytest.mark.parametrize("count", [9, 40])
def test_resamples_of_fid_are_those_of_the_testbeds(real, count):
    """Fewer and more pictures than features."""
    metric, images = Fid(None, "cpu", real, extractor=TinyExtractor()), pictures(count)
    features = TinyExtractor()(images)[0].double()
    wanted = bootstrap_distances(features, metric.mean, metric.covariance, Fid.draws)
    assert 9 < features.shape[1] < 40
    assert metric.measure([(images, [""] * count)]).draws == pytest.approx(wanted, rel=1e-5)


def test_real_pictures_of_all_folders_count_and_are_read_once(real, tmp_path, monkeypatch):
    first = Fid(None, "cpu", real, tmp_path, TinyExtractor())
    each = [TinyExtractor()(pictures(12, 30 + i, 20)[i : i + 1])[0] for i in range(12)]
    torch.testing.assert_close(first.mean, torch.cat(each).double().mean(0))
    monkeypatch.setattr(fid, "read_picture", lambda file: pytest.fail(f"{file} was read again"))
    again = Fid(None, "cpu", real, tmp_path, TinyExtractor())
    assert torch.equal(again.mean, first.mean) and torch.equal(again.covariance, first.covariance)


def test_an_identity_tells_weights_and_real_pictures_apart(clip, real, tmp_path):
    before = load_metric("clip", clip).identity
    assert load_metric("clip-iqa", clip).identity == before
    folder = save_clip(tmp_path / "other")
    model = CLIPModel.from_pretrained(folder)
    model.visual_projection.weight.data += 1
    model.save_pretrained(folder)
    assert load_metric("clip", folder).identity != before
    some = tmp_path / "some"
    some.mkdir()
    for file in list(real.glob("*.png"))[:3]:
        (some / file.name).write_bytes(file.read_bytes())
    found = Fid(None, "cpu", some, extractor=TinyExtractor()).identity
    assert found != Fid(None, "cpu", real, extractor=TinyExtractor()).identity
    assert fingerprint(real / "notes.txt") != fingerprint(next(real.glob("*.png")))


def test_an_unknown_metric_is_named_with_those_that_are_known():
    with pytest.raises(ValueError, match="unknown metric 'beauty'; wanted some of clip, clip-iqa, fid, image-reward"):
        load_metric("beauty")


@pytest.mark.parametrize("name", ["clip", "clip-iqa", "image-reward"])
def test_weights_that_cannot_be_fetched_say_how_to_give_them(name, offline):
    with pytest.raises(FileNotFoundError, match=f"metric '{name}' needs .* --weights {name}=PATH"):
        load_metric(name)


@pytest.mark.parametrize("name", ["clip", "clip-iqa", "image-reward"])
def test_a_wrong_folder_of_weights_is_refused(name, tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"metric '{name}' .*--weights {name}=PATH"):
            load_metric(name, str(folder))


def test_another_models_checkpoint_is_not_taken_for_image_reward(reward, tmp_path):
    (tmp_path / "vocab.txt").write_bytes((reward / "vocab.txt").read_bytes())
    for content in (b"nonsense", None):
        if content is None:
            torch.save({"blip.visual_encoder.cls_token": torch.zeros(1)}, tmp_path / "ImageReward.pt")
        else:
            (tmp_path / "ImageReward.pt").write_bytes(content)
        with pytest.raises(ValueError, match="is not ImageReward's checkpoint"):
            load_metric("image-reward", str(tmp_path))


@pytest.mark.parametrize("name", ["clip", "clip-iqa"])
def test_without_torchmetrics_the_extra_is_named(name, clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional", None)
    with pytest.raises(ImportError, match=r"needs torchmetrics .*pip install 'shiva_ext\[eval\]'"):
        load_metric(name, clip)


def test_fid_wants_real_pictures(tmp_path):
    with pytest.raises(ValueError, match="--real FOLDER"):
        load_metric("fid")
    with pytest.raises(FileNotFoundError, match="has 0 pictures, wanted a folder with at least 2"):
        load_metric("fid", real=tmp_path)


@pytest.mark.parametrize("broken", [ModuleNotFoundError("No module"), RuntimeError("torchvision::nms does not exist")])
def test_without_torch_fidelity_or_its_torchvision_the_extra_is_named(broken, real, monkeypatch):
    class Finder:
        @staticmethod
        def find_spec(name, *_):
            if name.split(".")[0] == "torch_fidelity":
                raise broken

    for name in [each for each in sys.modules if each.split(".")[0] == "torch_fidelity"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    with pytest.raises(ImportError, match=r"needs torch-fidelity and the torchvision .*pip install 'shiva_ext\[fid\]'"):
        load_metric("fid", real=real)


@pytest.fixture
def stand_in(monkeypatch):
    """In the place of torch-fidelity, which needs a torchvision that fits torch."""
    module, calls = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3"), []

    class FeatureExtractorInceptionV3(TinyExtractor):
        def __init__(self, name, features_list, feature_extractor_weights_path=None, **_):
            super().__init__()
            calls.append((name, features_list, feature_extractor_weights_path))
            if feature_extractor_weights_path is None:
                raise URLError("no route")
            torch.load(feature_extractor_weights_path)

    module.FeatureExtractorInceptionV3 = FeatureExtractorInceptionV3
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_inception_is_asked_for_as_fid_wants_it(stand_in, real, tmp_path):
    torch.save({}, tmp_path / "weights.pth")
    found = load_metric("fid", str(tmp_path / "weights.pth"), real=real).measure([(pictures(), PROMPTS)])
    assert found.value > 0 and stand_in == [("inception-v3-compat", ["2048"], str(tmp_path / "weights.pth"))]


def test_inception_weights_that_cannot_be_had_say_how_to_give_them(stand_in, real, tmp_path):
    with pytest.raises(FileNotFoundError, match="no route.*--weights fid=PATH"):
        load_metric("fid", real=real)
    with pytest.raises(FileNotFoundError, match="there is no file .*--weights fid=PATH"):
        load_metric("fid", str(tmp_path / "none.pth"), real=real)
    (tmp_path / "other.pth").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="other.pth does not hold the Inception weights"):
        load_metric("fid", str(tmp_path / "other.pth"), real=real)


def test_torch_fidelitys_own_network_and_formula(real, tmp_path):
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3, load_state_dict_from_url
        from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torch-fidelity is not part of 'make test', as it needs a torchvision that fits torch: {error}")
    module = sys.modules[FeatureExtractorInceptionV3.__module__]
    try:  # the network's own initial weights, by way of its download
        module.load_state_dict_from_url = lambda *_, **__: None
        load, nn.Module.load_state_dict = nn.Module.load_state_dict, lambda *_: None
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    finally:
        nn.Module.load_state_dict, module.load_state_dict_from_url = load, load_state_dict_from_url
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    metric = load_metric("fid", str(tmp_path / "weights.pth"), real=real)
    value = metric.measure([(pictures(6), [""] * 6)]).value
    own, images = network(pictures(6))[0], sorted(each for each in real.rglob("*.png"))
    others = torch.cat([network(fid.read_picture(file)[None])[0] for file in images])
    statistics = [fid_features_to_statistics(each.double()) for each in (own, others)]
    assert value == pytest.approx(fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"], rel=1e-3)


def test_every_metric_has_a_title_and_a_sense():
    assert {name: cls.larger_is_better for name, cls in METRICS.items()} == {
        "clip": True, "clip-iqa": True, "fid": False, "image-reward": True,
    }  # fmt: skip
    assert all(cls.title for cls in METRICS.values())
