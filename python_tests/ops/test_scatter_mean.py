"""scatter_mean beyond the matrix: the order of its sums, groups of none, one and all tokens."""

import pytest
import torch

from shiva_ext import ops

from .cases import DTYPES, Maker, Size, wide
from .device import place
from .matrix import same_bits

SIZE = Size(B=3, N=700, k=90, D=70, H=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_taken_in_token_order(dtype):
    m = Maker(SIZE, dtype)
    x, position = m.tokens(), m.groups()
    position[1] = 3  # a group of all tokens
    rows, groups = x.cpu().to(wide(dtype)), position.cpu()
    total, count = (torch.zeros(3, m.num_groups, D, dtype=wide(dtype)) for D in (70, 1))
    for b in range(3):
        for token in range(SIZE.N):
            total[b, groups[b, token]] += rows[b, token]
            count[b, groups[b, token]] += 1
    wanted = (total * (1 / count.clamp_min(1))).to(dtype)
    assert same_bits(ops.scatter_mean(x, position, m.num_groups).cpu(), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_alone_keeps_its_value_and_an_empty_group_is_zero(dtype):
    m = Maker(SIZE, dtype, content="inf")
    x, N = m.tokens(), SIZE.N
    order = torch.rand(3, N).argsort(dim=1)
    mean = ops.scatter_mean(x, place(2 * order), 2 * N).cpu()
    assert torch.equal(mean[:, 1::2], torch.zeros(3, N, 70, dtype=dtype))
    assert torch.equal(mean[:, ::2].gather(1, order[..., None].expand(-1, -1, 70)), x.cpu())


@pytest.mark.parametrize("M", [0, 1, 600])
def test_no_tokens_make_empty_groups(M):
    x, position = place(torch.zeros(2, 0, 5)).requires_grad_(), place(torch.zeros(2, 0, dtype=torch.int64))
    mean = ops.scatter_mean(x, position, M)
    assert mean.shape == (2, M, 5) and not mean.any()
    assert torch.autograd.grad(mean.sum(), x)[0].shape == (2, 0, 5)


def test_no_groups_are_fine_for_an_empty_batch():
    x, position = place(torch.zeros(0, 4, 5)), place(torch.zeros(0, 4, dtype=torch.int64))
    assert ops.scatter_mean(x, position, 0).shape == (0, 0, 5)


def test_a_bad_value_stays_in_its_group():
    x = torch.ones(1, 6, 4)
    x[0, 2, 1], x[0, 5, 3] = torch.nan, torch.inf
    mean = ops.scatter_mean(place(x), place(torch.tensor([[0, 0, 1, 1, 2, 2]])), 3).cpu()
    wanted = torch.ones(1, 3, 4)
    wanted[0, 1, 1], wanted[0, 2, 3] = torch.nan, torch.inf
    torch.testing.assert_close(mean, wanted, equal_nan=True)
