"""soft_rank of long float32 rows: sums over moments of bins on the CPU, against the pairs in float64."""

import pytest
import torch

from .device import place

SHAPES = {
    "normal": lambda n: torch.randn(n),
    "uniform": lambda n: 20 * torch.rand(n) - 3,
    "all equal": lambda n: torch.full((n,), -7.25),
    "two values": lambda n: torch.randint(2, (n,)).float(),
    "clusters far apart": lambda n: torch.randn(n) * 0.01 + 5.0 * torch.randint(3, (n,)),
    "one far away": lambda n: torch.cat([torch.randn(n - 1), torch.tensor([1e6])]),
    "tiny": lambda n: 1e-30 * torch.randn(n),
    "far from zero": lambda n: 1000 + torch.randn(n),
}


def pairs(scores, tau, grad=None):
    """Ranks of a float64 row, or their gradient, by blocks of the pair matrix."""
    found = []
    for rows in torch.arange(len(scores)).split(512):
        sigmoid = torch.sigmoid((scores - scores[rows, None]) / tau)
        if grad is None:
            found.append(0.5 + sigmoid.sum(-1))
        else:
            found.append((sigmoid * (1 - sigmoid) * (grad - grad[rows, None])).sum(-1) / tau)
    return torch.cat(found)


@pytest.mark.parametrize("tau", [1e-3, 0.02, 0.2, 3.0, 1e4])
@pytest.mark.parametrize("n", [255, 256, 1000, 4096])
@pytest.mark.parametrize("shape", SHAPES)
def test_long_rows_equal_the_pairs(shape, n, tau):
    torch.manual_seed(n)
    scores, grad = SHAPES[shape](n), torch.randn(n)
    ranks = torch.ops.shiva.soft_rank(place(scores[None]), tau)[0].cpu()
    torch.testing.assert_close(ranks.double(), pairs(scores.double(), tau), rtol=0, atol=2e-6 * n)
    got = torch.ops.shiva.soft_rank_backward(place(grad[None]), place(scores[None]), tau)[0].cpu()
    wanted = pairs(scores.double(), tau, grad.double())
    slopes = pairs(scores.double(), tau, grad.double().abs() + 1).abs().max() + wanted.abs().max()
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5 * float(slopes) + 1e-30)


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e4])
def test_a_constant_in_the_gradient_changes_nothing(offset):
    torch.manual_seed(0)
    scores, grad = torch.randn(1, 4096), (1024 * torch.randn(1, 4096)).round() / 1024  # exact with the offset
    plain = torch.ops.shiva.soft_rank_backward(place(grad), place(scores), 0.2)
    moved = torch.ops.shiva.soft_rank_backward(place(grad + offset), place(scores), 0.2)
    torch.testing.assert_close(moved, plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())
    level = torch.ops.shiva.soft_rank_backward(place(torch.full_like(grad, offset)), place(scores), 0.2)
    assert torch.equal(level, torch.zeros_like(level))


def test_infinite_scores_among_many_count_as_in_short_rows():
    torch.manual_seed(0)
    scores = torch.randn(1, 1000)
    scores[0, 10], scores[0, 20] = torch.inf, -torch.inf
    ranks = torch.ops.shiva.soft_rank(place(scores), 0.3)[0].cpu()
    finite = scores[0].isfinite()
    assert ranks[10] == 1 and ranks[20] == 1000
    torch.testing.assert_close(ranks[finite].double(), 1 + pairs(scores[0, finite].double(), 0.3), rtol=0, atol=1e-3)
    grad = torch.ops.shiva.soft_rank_backward(place(torch.randn(1, 1000)), place(scores), 0.3)[0].cpu()
    assert grad[10] == 0 and grad[20] == 0 and grad.isfinite().all()
    scores[0, 30] = torch.inf
    ranks = torch.ops.shiva.soft_rank(place(scores), 0.3)[0].cpu()
    assert ranks[10].isnan() and ranks[30].isnan() and ranks[scores[0].isfinite()].isfinite().all()
    scores[0, 40] = torch.nan
    assert torch.ops.shiva.soft_rank(place(scores), 0.3).isnan().all()


def test_the_gradient_at_an_infinite_score_spoils_no_other():
    torch.manual_seed(0)
    scores, grad = torch.randn(1, 1000), torch.randn(1, 1000)
    scores[0, 10] = torch.inf
    wanted = torch.ops.shiva.soft_rank_backward(place(grad), place(scores), 0.3)
    grad[0, 10] = 1e30
    assert torch.equal(torch.ops.shiva.soft_rank_backward(place(grad), place(scores), 0.3), wanted)
    grad[0, 500] = torch.inf
    spoilt = torch.ops.shiva.soft_rank_backward(place(grad), place(scores), 0.3)[0].cpu()
    assert spoilt[500].isnan() and (spoilt == torch.inf).sum() > 900


@pytest.mark.parametrize("n", [40000, 300000])
def test_a_rows_parts_do_not_depend_on_the_threads(n):
    torch.manual_seed(0)
    scores, grad, found = torch.randn(1, n), torch.randn(1, n), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(torch.ops.shiva.soft_rank(place(scores), 0.1))
        found.append(torch.ops.shiva.soft_rank_backward(place(grad), place(scores), 0.1))
    assert all(torch.equal(found[i], found[i % 2]) for i in range(6))
    assert (found[0].cpu()[0, scores[0].argsort(descending=True)].diff() >= -1e-2).all()
    assert abs(float(found[0].double().sum()) / (n * (n + 1) / 2) - 1) < 1e-6


def test_half_precisions_take_the_same_way():
    torch.manual_seed(0)
    scores = torch.randn(2, 2048).bfloat16()
    ranks = torch.ops.shiva.soft_rank(place(scores), 0.2)
    assert torch.equal(ranks, torch.ops.shiva.soft_rank(place(scores.float()), 0.2))
