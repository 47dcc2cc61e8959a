"""Selectors without training."""

import pytest
import torch

from shiva_ext.selection import LargestNormSelector, RandomSelector

X = torch.zeros(4, 1000, 2)


def test_random_scores_depend_on_seed_layer_sigma_and_row_only():
    reference = RandomSelector(0.6, seed=1).scores(3, X, 0.5)
    torch.manual_seed(123)
    assert torch.equal(RandomSelector(0.6, seed=1).scores(3, X + 5, 0.5), reference)
    assert torch.equal(RandomSelector(0.6, seed=1).scores(3, X[:2], 0.5), reference[:2])
    for other in (
        RandomSelector(0.6, seed=2).scores(3, X, 0.5),
        RandomSelector(0.6, seed=1).scores(4, X, 0.5),
        RandomSelector(0.6, seed=1).scores(3, X, 0.55),
        reference.roll(1, 0),
    ):
        assert (other == reference).float().mean() < 0.01


def test_random_scores_leave_torchs_generator_alone():
    state = torch.get_rng_state()
    RandomSelector(0.5).scores(1, X, 0.2)
    assert torch.equal(torch.get_rng_state(), state)


def test_random_scores_are_uniform_and_uncorrelated():
    draws = torch.stack([RandomSelector(0.5, seed).scores(layer, X, 0.3) for seed in range(20) for layer in range(3)])
    assert draws.dtype == torch.float32 and 0 <= draws.min() and draws.max() < 1
    histogram = torch.histc(draws, bins=20, min=0, max=1) / draws.numel()
    torch.testing.assert_close(histogram, torch.full((20,), 0.05), atol=0.002, rtol=0)
    rows = draws.reshape(-1, 1000)
    between_rows = torch.corrcoef(rows)[~torch.eye(len(rows), dtype=torch.bool)]
    assert abs(between_rows.mean()) < 0.002 and abs(between_rows.std() - 1000**-0.5) < 0.003
    neighbours = torch.corrcoef(torch.stack([draws[..., :-1].flatten(), draws[..., 1:].flatten()]))[0, 1]
    assert abs(neighbours) < 0.01


def test_every_position_is_chosen_equally_often():
    chosen = torch.zeros(100)
    for seed in range(500):
        chosen[RandomSelector(0.5, seed).scores(1, X[:1, :100], 0.3)[0].topk(50).indices] += 1
    assert 190 < chosen.min() and chosen.max() < 310  # 5.5 standard deviations of Binomial(500, 1/2)


def test_the_largest_norm_is_the_euclidean_one():
    x = torch.randn(2, 5, 3)
    scores = LargestNormSelector(0.5).scores(2, x, 0.1)
    for b in range(2):
        for i in range(5):
            assert scores[b, i].item() == pytest.approx(sum(v**2 for v in x[b, i].tolist()) ** 0.5, rel=1e-5)
    large = torch.full((1, 2, 4), 60000.0, dtype=torch.float16)
    assert torch.isfinite(LargestNormSelector(0.5).scores(2, large, 0.1)).all()


@pytest.mark.parametrize("selector", [RandomSelector, LargestNormSelector])
@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.01, float("nan")])
def test_a_ratio_outside_zero_to_one_is_an_error(selector, ratio):
    with pytest.raises(ValueError, match="wanted a share above 0 and at most 1"):
        selector(ratio)
