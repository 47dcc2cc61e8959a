"""The classifier that ships: its accuracy, statistics, training and errors. One test alone needs the data set."""

import gzip
import json
import math
import struct

import pytest
import torch

from shiva_ext.evaluation.metrics import frechet_distance, gaussian, precision_recall
from shiva_ext.testbed.classifier import (
    FEATURES,
    Classifier,
    ClassifierConfig,
    load_classifier,
    load_statistics,
    train,
)
from shiva_ext.testbed.data import load_split, to_float
from shiva_ext.testbed.model import ASSETS


@pytest.fixture(scope="module")
def shipped():
    return load_classifier(), load_statistics()


def test_recorded_accuracy_is_at_least_92_percent():
    record = json.loads((ASSETS / "classifier" / "classifier.json").read_text())
    assert record["test_accuracy"] >= 0.92


def test_recorded_accuracy_is_what_the_test_split_gives(shipped):
    try:
        images, labels = load_split("test", None)
    except FileNotFoundError:
        pytest.skip("Fashion-MNIST is not installed (apt-get install dataset-fashion-mnist)")
    _, predicted = shipped[0].measure(to_float(images))
    record = json.loads((ASSETS / "classifier" / "classifier.json").read_text())
    assert (predicted == labels).double().mean().item() == pytest.approx(record["test_accuracy"], abs=5e-4)


def test_shipped_examples_are_recognised(shipped):
    classifier, statistics = shipped
    _, predicted = classifier.measure(to_float(statistics["example_images"]))
    assert (predicted == statistics["example_labels"]).double().mean() >= 0.86
    assert statistics["example_labels"].bincount().tolist() == [5] * 10


def test_shipped_folder_is_small():
    assert sum(file.stat().st_size for file in (ASSETS / "classifier").iterdir()) < 2**20


def test_shipped_statistics_describe_the_classifiers_features(shipped):
    classifier, statistics = shipped
    assert statistics["features"].shape == (2000, FEATURES)
    distance = frechet_distance(*gaussian(statistics["features"]), statistics["mean"], statistics["covariance"])
    assert distance < 0.01 * statistics["covariance"].trace()
    features, _ = classifier.measure(to_float(statistics["example_images"]))
    assert precision_recall(statistics["features"], features).precision > 0.8


def test_noise_is_far_from_clothes(shipped):
    classifier, statistics = shipped
    images = torch.randn(100, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    features, _ = classifier.measure(images)
    distance = frechet_distance(*gaussian(features), statistics["mean"], statistics["covariance"])
    assert distance > 0.5 * statistics["covariance"].trace()
    assert precision_recall(statistics["features"], features).precision < 0.1


def test_features_do_not_depend_on_the_batch_or_on_values_off_screen(shipped):
    classifier, statistics = shipped
    images = to_float(statistics["example_images"])
    features, predicted = classifier.measure(images)
    assert features.dtype == torch.float32 and predicted.dtype == torch.int64
    torch.testing.assert_close(classifier.measure(images, batch_size=7)[0], features, rtol=1e-4, atol=1e-4)
    off_screen = torch.where(images.abs() == 1, 3 * images, images)
    torch.testing.assert_close(classifier.measure(off_screen)[0], features)


def test_loaded_classifier_is_frozen(shipped):
    classifier, _ = shipped
    assert not classifier.training and not any(p.requires_grad for p in classifier.parameters())
    assert {p.dtype for p in classifier.parameters()} == {torch.float32}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_images_that_are_not_finite_are_refused(shipped, bad):
    images = torch.zeros(3, 1, 32, 32)
    images[1, 0, 5, 5] = bad
    with pytest.raises(ValueError, match="1 of 3 images hold NaN or infinite pixels"):
        shipped[0].measure(images)


@pytest.mark.parametrize("shape", [(1, 32, 32), (1, 3, 32, 32), (1, 1, 28, 28)])
def test_images_of_another_shape_are_refused(shipped, shape):
    with pytest.raises(ValueError, match=r"images must be \[B, 1, 32, 32\] in \[-1, 1\], got"):
        shipped[0].measure(torch.zeros(shape))


def test_no_images_give_no_features(shipped):
    features, predicted = shipped[0].measure(torch.zeros(0, 1, 32, 32))
    assert features.shape == (0, FEATURES) and predicted.shape == (0,)


def test_one_image_is_enough(shipped):
    features, predicted = shipped[0].measure(to_float(shipped[1]["example_images"][:1]))
    assert features.shape == (1, FEATURES) and predicted.tolist() == [0]


def test_folder_without_a_classifier_names_the_command(tmp_path):
    for load in (load_classifier, load_statistics):
        with pytest.raises(FileNotFoundError, match="shiva train classifier"):
            load(tmp_path)


def write_split(folder, prefix, images, labels):
    for name, array, dimensions in (("images-idx3", images, images.shape), ("labels-idx1", labels, labels.shape)):
        header = struct.pack(f">BBBB{len(dimensions)}i", 0, 0, 8, len(dimensions), *dimensions)
        with gzip.open(folder / f"{prefix}-{name}-ubyte.gz", "wb") as file:
            file.write(header + array.to(torch.uint8).numpy().tobytes())


def test_training_learns_writes_what_loads_and_repeats_exactly(tmp_path):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 10
    images = torch.zeros(400, 28, 28)
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 6] = 200  # a bar whose height is the class
    images += 20 * torch.rand(images.shape, generator=generator)
    write_split(tmp_path, "train", images[:240], labels[:240])
    write_split(tmp_path, "t10k", images[240:], labels[240:])
    config = ClassifierConfig(epochs=6, batch_size=20, ema=0.9)
    record = train(config, tmp_path / "first", str(tmp_path))
    assert record["test_accuracy"] > 0.9 and record["loss_per_epoch"][-1] < record["loss_per_epoch"][0]
    again = train(config, tmp_path / "second", str(tmp_path))
    assert again["loss_per_epoch"] == record["loss_per_epoch"]
    examples = to_float(load_statistics(tmp_path / "first")["example_images"])
    first, second = (load_classifier(tmp_path / name).measure(examples)[0] for name in ("first", "second"))
    assert torch.equal(first, second)


def test_classifier_is_below_a_megabyte_of_parameters():
    assert sum(parameter.numel() for parameter in Classifier().parameters()) < 250_000
