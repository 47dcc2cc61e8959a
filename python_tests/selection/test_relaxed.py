"""Other relaxations of a top-k: the published test vectors, what they converge to, and a training step with each."""

import pytest
import torch

from shiva_ext.selection import ESTIMATORS, NoiseEstimator, RelaxedEstimator, SoftSortEstimator, get_estimator
from shiva_ext.selection.relaxed import gumbel, neural_sort, soft_top_k, subset_operator

S = torch.tensor([[9.0, 1.0, 5.0, 2.0]])


def test_neuralsort_vectors():
    """Of the paper's formula at tau 5, and its soft top-2 mask."""
    wanted = [
        [0.6448, 0.0176, 0.2897, 0.0479],
        [0.1954, 0.1310, 0.4349, 0.2387],
        [0.0206, 0.3387, 0.2270, 0.4137],
        [0.0013, 0.5111, 0.0692, 0.4185],
    ]
    rows = neural_sort(S, 4, 5.0)
    torch.testing.assert_close(rows[0], torch.tensor(wanted), atol=1e-4, rtol=0)
    torch.testing.assert_close(rows[0, :2].sum(0), torch.tensor([0.840, 0.149, 0.725, 0.287]), atol=1e-3, rtol=0)
    row = neural_sort(torch.tensor([[0.9, 0.1, 0.5, 0.2]]), 1, 1.0)[0, 0]
    torch.testing.assert_close(row, torch.tensor([0.474, 0.078, 0.318, 0.129]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("tau", [0.01, 1.0, 100.0])
def test_neuralsort_rows_sum_to_one_and_point_at_the_sorted_scores(tau):
    torch.manual_seed(0)
    scores = torch.randn(3, 12, dtype=torch.float64)
    rows = neural_sort(scores, 12, tau)
    torch.testing.assert_close(rows.sum(-1), torch.ones(3, 12, dtype=torch.float64))
    assert torch.equal(rows.argmax(-1), scores.argsort(-1, descending=True))
    torch.testing.assert_close(neural_sort(scores, 5, tau), rows[:, :5])


def test_neuralsort_equals_its_formula_with_all_pairs():
    scores = torch.randn(2, 9, dtype=torch.float64)
    pairs = (scores[:, :, None] - scores[:, None]).abs().sum(-1)
    factor = 9 + 1 - 2 * torch.arange(1, 10, dtype=torch.float64)
    wanted = torch.softmax((factor[:, None] * scores[:, None] - pairs[:, None]) / 0.7, dim=-1)
    torch.testing.assert_close(neural_sort(scores, 9, 0.7), wanted)


def test_neuralsort_gradient():
    scores = torch.randn(1, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: neural_sort(s, 3, 0.9), scores)


def test_subset_operator_vectors():
    keys = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    found = subset_operator(keys, 2, 2, 1.0)
    torch.testing.assert_close(found, torch.tensor([[1.0843, 0.5841, 0.2399, 0.0917]]), atol=1e-4, rtol=0)
    torch.testing.assert_close(subset_operator(keys, 2, 2, 0.1), torch.tensor([[1.0, 1, 0, 0]]), atol=1e-3, rtol=0)
    torch.testing.assert_close(subset_operator(torch.randn(3, 20), 7, 7, 0.5).sum(-1), torch.full((3,), 7.0))
    torch.testing.assert_close(subset_operator(torch.randn(3, 20), 7.25, 7, 0.5).sum(-1), torch.full((3,), 7.25))


def test_gumbel_draws_as_often_as_softmax_says():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([1.0, 0.0, -1.0, 0.5])
    drawn = gumbel(logits.expand(100_000, -1), generator).argmax(-1)
    found = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(found, logits.softmax(0), atol=0.006, rtol=0)


@pytest.mark.parametrize("k", [0, 1, 5, 7, 8])
def test_soft_top_k_is_hard_at_low_temperature(k):
    keys = torch.randperm(8).float()[None]
    found = soft_top_k(keys, k, k, 1e-3)
    assert torch.equal(found[0].round().nonzero()[:, 0], keys[0].topk(k).indices.sort().values)


@pytest.mark.parametrize("relaxation", ["soft_top_k", "subset", "neuralsort"])
def test_more_tokens_means_more_inclusion(relaxation):
    """The derivative in k, by finite differences within one integer, and its sign."""
    estimator = RelaxedEstimator(relaxation, tau=(0.5, 0.5))
    keys = torch.randn(2, 10, dtype=torch.float64)
    k = torch.tensor(4.3, dtype=torch.float64, requires_grad=True)
    estimator.inclusion(keys, k, 4).sum().backward()
    h = 1e-4
    wanted = (estimator.inclusion(keys, 4.3 + h, 4).sum() - estimator.inclusion(keys, 4.3 - h, 4).sum()) / (2 * h)
    assert k.grad.item() == pytest.approx(wanted.item(), rel=1e-4) and k.grad > 0


@pytest.mark.parametrize("relaxation", ["soft_top_k", "subset", "neuralsort"])
def test_a_relaxation_is_continuous_where_k_is_whole(relaxation):
    estimator = RelaxedEstimator(relaxation, tau=(0.5, 0.5))
    keys = torch.randn(2, 10, dtype=torch.float64)
    torch.testing.assert_close(estimator.inclusion(keys, 5.0, 4), estimator.inclusion(keys, 5.0, 5))


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
@pytest.mark.parametrize("k", [1, 5, 12])
def test_one_pruned_block_with_each(name, k):
    """Shapes, finite gradients, and the exact budget where the hard choice is what runs."""
    torch.manual_seed(0)
    B, N, D = 2, 12, 4
    x, weight = torch.randn(B, N, D), torch.randn(D, D, requires_grad=True)
    scores = torch.randn(B, N, requires_grad=True)
    ratio = torch.tensor(k / N, requires_grad=True)
    seen = []

    def block(tokens):
        seen.append(tokens.shape[1])
        return tokens + torch.tanh(tokens @ weight)

    estimator = get_estimator(name, generator=torch.Generator().manual_seed(1))
    y, kept = estimator.apply(block, x, scores, N * ratio, k, update=torch.randn(B, N, D))
    y.square().sum().backward()
    assert y.shape == x.shape and torch.isfinite(y).all()
    assert torch.isfinite(scores.grad).all() and torch.isfinite(weight.grad).all()
    on_all = isinstance(estimator, NoiseEstimator)
    assert seen == [N if on_all else k] and kept.shape == (B, N if on_all else k)
    assert scores.grad.abs().sum() > 0 or k == N
    if not on_all and not isinstance(estimator, SoftSortEstimator):
        rejected = torch.ones(B, N, dtype=torch.bool).scatter(1, kept, False)
        assert torch.equal(y[rejected], x[rejected])


def test_gated_gradient_is_the_update_of_kept_tokens():
    x = torch.randn(1, 6, 3)
    estimator, pi = RelaxedEstimator(), torch.full((1, 6), 0.5, requires_grad=True)
    kept = torch.tensor([[1, 4]])
    update, g = torch.randn(1, 2, 3), torch.randn(1, 6, 3)
    y = estimator._run(lambda t: t + update, x, pi, kept, torch.tensor([[0, 2, 3, 5]]), None)
    (y * g).sum().backward()
    wanted = torch.zeros(1, 6).scatter(1, kept, (g[:, kept[0]] * update).sum(-1))
    torch.testing.assert_close(pi.grad, wanted)


def test_noise_has_the_published_spread_and_spares_the_relevant():
    estimator = NoiseEstimator(generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 4, 20_000)
    scores = torch.tensor([[3.0, 0.0, 0.0, 1.0]])
    y, _ = estimator.apply(lambda t: t, x, scores, 2, 2)
    share = scores.softmax(-1)
    assert share.sum().item() == pytest.approx(1)
    torch.testing.assert_close((y - x).std(-1), 0.02 * x.std() * (1 - share), rtol=0.03, atol=0)
    rescaled = NoiseEstimator(rescaled=True, generator=torch.Generator().manual_seed(0))
    y, _ = rescaled.apply(lambda t: t, x, scores, 2, 2)
    assert torch.equal(y[:, 0], x[:, 0])  # the most relevant token gets none


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="relaxation is 'sparsemax'"):
        RelaxedEstimator("sparsemax")
    with pytest.raises(ValueError, match="noise 'normal'"):
        RelaxedEstimator(noise="normal")
