"""The metrics against closed forms, constructed cases and hostile input."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from shiva_ext.evaluation.metrics import (
    ForegroundRecall,
    bootstrap_distances,
    class_accuracy,
    foreground_tokens,
    frechet_distance,
    gaussian,
    precision_recall,
    psnr,
    ssim,
)


def random_covariance(features, rank=None, seed=0):
    factor = torch.randn(features, rank or features, generator=torch.Generator().manual_seed(seed)).double()
    return factor @ factor.T / features


# Fréchet distance


def test_distance_of_a_gaussian_to_itself_is_zero():
    mean, covariance = torch.randn(12), random_covariance(12)
    assert frechet_distance(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-12)


def test_distance_of_diagonal_gaussians_is_the_closed_form():
    mean, other = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0, 5.0])
    variance, other_variance = torch.tensor([1.0, 4.0, 0.0]), torch.tensor([9.0, 4.0, 16.0])
    distance = frechet_distance(mean, variance.diag(), other, other_variance.diag())
    assert distance == pytest.approx((1 + 0 + 4) + (2**2 + 0 + 4**2))


def test_distance_of_commuting_covariances_is_that_of_their_spectra():
    basis = torch.linalg.qr(torch.randn(6, 6).double()).Q
    spectrum, other = torch.rand(6).double(), torch.rand(6).double()
    distance = frechet_distance(
        torch.zeros(6), basis @ spectrum.diag() @ basis.T, torch.zeros(6), basis @ other.diag() @ basis.T
    )
    assert distance == pytest.approx((spectrum.sqrt() - other.sqrt()).square().sum().item(), rel=1e-9)


def test_distance_equals_the_usual_matrix_square_root():
    covariance, other = random_covariance(20, seed=1), random_covariance(20, seed=2)
    product = scipy.linalg.sqrtm((covariance @ other).numpy())
    expected = (covariance.trace() + other.trace()).item() - 2 * np.trace(product).real
    assert frechet_distance(torch.zeros(20), covariance, torch.zeros(20), other) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 15])
def test_singular_covariances_give_a_finite_symmetric_distance(rank):
    covariance, other = random_covariance(16, rank, seed=1), random_covariance(16, seed=2)
    forth = frechet_distance(torch.zeros(16), covariance, torch.ones(16), other)
    assert math.isfinite(forth) and forth > 16
    assert forth == pytest.approx(frechet_distance(torch.ones(16), other, torch.zeros(16), covariance), rel=1e-9)
    assert frechet_distance(torch.zeros(16), covariance, torch.zeros(16), covariance) == pytest.approx(0, abs=1e-10)


def test_distance_of_sampled_gaussians_approaches_the_true_one():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(20000, 4, generator=generator)
    second = 2 * torch.randn(20000, 4, generator=generator) + 1
    assert frechet_distance(*gaussian(first), *gaussian(second)) == pytest.approx(4 + 4, rel=0.03)


def test_covariance_is_the_unbiased_one():
    features = torch.randn(50, 3).double()
    mean, covariance = gaussian(features)
    torch.testing.assert_close(mean, features.mean(0))
    torch.testing.assert_close(covariance, features.T.cov())


def test_one_sample_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2 samples are needed, got 1"):
        gaussian(torch.zeros(1, 4))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused(bad):
    features = torch.zeros(10, 4)
    features[3, 1] = bad
    for call in (lambda: gaussian(features), lambda: precision_recall(torch.zeros(10, 4), features)):
        with pytest.raises(ValueError, match="must be finite"):
            call()


def test_statistics_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match=r"other_covariance \[3, 3\]"):
        frechet_distance(torch.zeros(4), torch.eye(4), torch.zeros(4), torch.eye(3))
    with pytest.raises(ValueError, match="covariance must be finite"):
        frechet_distance(torch.zeros(4), torch.eye(4) / 0, torch.zeros(4), torch.eye(4))
    with pytest.raises(ValueError, match=r"means must be \[F\]"):
        frechet_distance(torch.zeros(4, 1), torch.eye(4), torch.zeros(4), torch.eye(4))


# Precision and recall


def test_equal_sets_have_full_precision_and_recall():
    features = torch.randn(50, 8)
    assert precision_recall(features, features) == (1, 1)


def test_sets_far_apart_have_none():
    features = torch.randn(50, 8)
    assert precision_recall(features, features + 1000) == (0, 0)


def test_a_dropped_mode_costs_recall_and_an_invented_one_precision():
    generator = torch.Generator().manual_seed(0)
    mode, other = torch.randn(40, 2, generator=generator), torch.randn(60, 2, generator=generator) + 1000
    both = torch.cat([mode, other])
    dropped = precision_recall(both, mode)
    assert dropped.precision == 1 and dropped.recall == pytest.approx(0.4)
    invented = precision_recall(mode, both)
    assert invented.precision == pytest.approx(0.4) and invented.recall == 1


def test_radius_reaches_the_third_neighbour_and_no_further():
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0]])  # radii 3, 2, 2, 3
    generated = torch.tensor([[-3.0], [-3.1], [6.0], [6.1], [1.5]])
    assert precision_recall(real, generated).precision == pytest.approx(3 / 5)


def test_more_samples_than_a_block_change_nothing():
    features = torch.randn(1500, 2)
    assert precision_recall(features, features) == (1, 1)


def test_fewer_samples_than_neighbours_are_refused():
    with pytest.raises(ValueError, match="at least 4 samples are needed, got 3"):
        precision_recall(torch.randn(10, 2), torch.randn(3, 2))


def test_features_of_different_networks_are_refused():
    with pytest.raises(ValueError, match="as many features, got 2 and 3"):
        precision_recall(torch.randn(10, 2), torch.randn(10, 3))


# PSNR, accuracy


def test_psnr_of_a_constant_error_is_the_closed_form():
    reference = torch.zeros(2, 1, 4, 4)
    error = torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)
    torch.testing.assert_close(psnr(reference + error, reference), torch.tensor([20.0, 40.0]).double())


def test_psnr_ignores_what_a_screen_cannot_show():
    reference = torch.full((1, 1, 4, 4), -1.0)
    assert psnr(reference - 3, reference).item() == math.inf


def test_psnr_refuses_nan_and_other_shapes():
    with pytest.raises(ValueError, match="pixels must be finite"):
        psnr(torch.full((1, 1, 4, 4), math.nan), torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="must have one shape"):
        psnr(torch.zeros(2, 1, 4, 4), torch.zeros(1, 1, 4, 4))


def test_accuracy_counts_matches():
    assert class_accuracy(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 0, 4])) == 0.75
    with pytest.raises(ValueError, match="M >= 1"):
        class_accuracy(torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long))


# Foreground


def test_a_token_is_foreground_if_any_pixel_shows():
    images = torch.full((1, 1, 4, 6), -1.0)
    images[0, 0, 1, 2] = 0.0  # lower left pixel of the second patch
    images[0, 0, 2:, :2] = -0.95  # sampler noise on the background
    assert foreground_tokens(images).tolist() == [[False, True, False, False, False, False]]


def test_tokens_are_numbered_as_the_model_numbers_them():
    from diffusers.models.embeddings import PatchEmbed

    embed = PatchEmbed(8, 8, 2, in_channels=1, embed_dim=8, bias=False, pos_embed_type=None, interpolation_scale=1)
    embed.proj.weight.data.fill_(1.0)
    images = torch.full((1, 1, 8, 8), -1.0)
    images[0, 0, 3, 6] = 1.0
    (changed,) = (embed(images) != -4).all(-1)
    assert torch.equal(foreground_tokens(images)[0], changed)


@pytest.mark.parametrize("doubled", [False, True])
def test_recall_is_the_mean_over_steps_and_layers(doubled):
    images = torch.full((2, 1, 4, 4), -1.0)
    images[0, 0, 0, 0] = images[1, 0, 3, 3] = 1.0  # token 0 of the first, token 3 of the second image

    def kept(*rows):
        index = torch.tensor(rows)
        return torch.cat([torch.ones_like(index), index]) if doubled else index

    recall = ForegroundRecall()
    recall.add(images, [{1: kept([0, 1], [2, 3])}, {1: kept([0, 1], [0, 1]), 2: kept([1, 2], [1, 2])}])
    assert recall.value == pytest.approx((1 + 0.5 + 0) / 3)


def test_a_layer_left_dense_counts_as_fully_kept():
    recall, images = ForegroundRecall(), torch.ones(1, 1, 4, 4)
    recall.add(images, [{1: torch.tensor([[0, 1]])}, {}], dense_layers=range(1, 3))
    assert recall.value == pytest.approx((0.5 + 1 + 1 + 1) / 4)


def test_random_choice_recalls_its_ratio():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(64, 1, 32, 32, generator=generator) - 1.5
    kept = torch.rand(64, 256, generator=generator).topk(154, dim=1).indices
    recall = ForegroundRecall()
    recall.add(images, [{1: kept}])
    assert recall.value == pytest.approx(0.6, abs=0.02)


def test_recall_of_nothing_is_none():
    recall = ForegroundRecall()
    recall.add(torch.full((1, 1, 4, 4), -1.0), [{1: torch.tensor([[0]])}])
    recall.add(torch.ones(1, 1, 4, 4), [{}])
    assert recall.value is None


def test_foreground_refuses_nan_wrong_shapes_and_foreign_indices():
    recall, images = ForegroundRecall(), torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match="pixels must be finite"):
        recall.add(images * math.nan, [])
    with pytest.raises(ValueError, match="multiples of 2"):
        foreground_tokens(torch.zeros(1, 1, 5, 4))
    with pytest.raises(ValueError, match=r"must be \[2, k\] or \[4, k\] for 2 images, got \[3, 1\]"):
        recall.add(images, [{1: torch.zeros(3, 1, dtype=torch.long)}])
    with pytest.raises(ValueError, match="indices outside 0..3"):
        recall.add(images, [{1: torch.full((2, 1), 4)}])


def test_ssim_is_one_for_equal_images_and_falls_with_noise():
    images = torch.rand(3, 1, 16, 16) * 2 - 1
    assert ssim(images, images).tolist() == pytest.approx([1, 1, 1])
    slightly, more = (ssim(images + spread * torch.randn_like(images), images).mean() for spread in (0.1, 0.5))
    assert 1 > slightly > more
    assert ssim(images.half(), images.half()).shape == (3,)


def test_the_bootstraps_error_is_the_spread_of_new_samples():
    """Gaussian features: the deviation of the distance over fresh sets of samples, against the estimate from one."""
    torch.manual_seed(0)
    mean, covariance = torch.zeros(3), torch.eye(3)
    fresh = [frechet_distance(*gaussian(torch.randn(300, 3) + 0.5), mean, covariance) for _ in range(200)]
    wanted = 1.96 * torch.tensor(fresh).std().item()
    draws = bootstrap_distances(torch.randn(300, 3) + 0.5, mean, covariance, draws=200)
    assert len(draws) == 200 and 1.96 * torch.tensor(draws).std().item() == pytest.approx(wanted, rel=0.25)


def test_labels_that_were_given_are_no_chance():
    """Two classes far apart, always half of each: the spread over fresh sets is that within the classes."""
    torch.manual_seed(0)
    labels = torch.arange(300) % 2
    mean, covariance = torch.zeros(3), 30 * torch.eye(3)

    def sample():
        return torch.randn(300, 3) + 10 * labels[:, None]

    fresh = [frechet_distance(*gaussian(sample()), mean, covariance) for _ in range(200)]
    wanted = torch.tensor(fresh).std().item()
    found = torch.tensor(bootstrap_distances(sample(), mean, covariance, 200, labels=labels)).std().item()
    blind = torch.tensor(bootstrap_distances(sample(), mean, covariance, 200)).std().item()
    assert found == pytest.approx(wanted, rel=0.3) and blind > 2 * wanted
    few = torch.arange(300) % 100  # three of each: as if there were no labels
    features = sample()
    assert bootstrap_distances(features, mean, covariance, 5, labels=few) == bootstrap_distances(
        features, mean, covariance, 5
    )


def test_equal_seeds_resample_the_same_rows():
    """Features that differ by a rotation and a shift of the reference have the same distances, draw by draw."""
    torch.manual_seed(0)
    features = torch.randn(300, 3, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    mean, covariance = torch.ones(3).double(), torch.eye(3).double()
    first = bootstrap_distances(features, mean, covariance, 20)
    second = bootstrap_distances(features @ rotation, mean @ rotation, covariance, 20)
    assert first == pytest.approx(second, rel=1e-6)
    assert first != pytest.approx(bootstrap_distances(features, mean, covariance, 20, seed=1), rel=1e-3)
