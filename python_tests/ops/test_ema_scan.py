"""ema_scan beyond the matrix: the figures of its source, restarts, decoding step by step."""

import pytest
import torch

from shiva_ext import ops

from .cases import Maker, Size, wide
from .device import place
from .matrix import same_bits

SIZE = Size(B=3, N=200, k=1, D=70, H=1)


def test_the_published_example():
    x, p = place(torch.tensor([[[1.0], [3.0], [2.0]]])), place(torch.tensor([[1.0, 0.8, 0.6]]))
    torch.testing.assert_close(ops.ema_scan(x, p).cpu(), torch.tensor([[[1.0], [2.6], [2.24]]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_ones_give_x_and_zeros_nothing(dtype):
    x = Maker(SIZE, dtype).tokens()
    ones = place(torch.ones(3, 200, dtype=wide(dtype)))
    assert torch.equal(ops.ema_scan(x, ones), x)
    assert not ops.ema_scan(x, 0 * ones).any()


def test_a_constant_weight_gives_a_geometric_series():
    x, p = torch.zeros(1, 50, 1), torch.full((1, 50), 0.25)
    x[0, 0] = 1
    wanted = 0.25 * 0.75 ** torch.arange(50.0)
    torch.testing.assert_close(ops.ema_scan(place(x), place(p)).cpu()[0, :, 0], wanted)


@pytest.mark.parametrize("start", [1, 63, 64, 65, 128, 150])
def test_sequences_in_one_row_do_not_see_each_other(start):
    m = Maker(SIZE, torch.float32)
    x, p = m.tokens().clone(), m.restarts().clone()
    p[:, start] = 1
    alone = ops.ema_scan(x[:, start:], p[:, start:])
    x[:, :start] = torch.nan
    x[0, 0], x[1, 0] = torch.inf, -torch.inf
    x.requires_grad_(), p.requires_grad_()
    together = ops.ema_scan(x, p)
    torch.testing.assert_close(together[:, start:], alone)
    grad = torch.autograd.grad(together[:, start:].sum(), [x, p])
    assert all(g[:, start:].isfinite().all() for g in grad)
    assert not grad[0][:, :start].any()


def test_a_later_token_changes_nothing_before_it():
    m = Maker(SIZE, torch.float32)
    x, p = m.tokens(), m.restarts()
    before = ops.ema_scan(x, p)
    changed = x.clone()
    changed[:, 120] += 1
    assert same_bits(ops.ema_scan(changed, p)[:, :120], before[:, :120])


def test_step_by_step_it_is_the_same():
    m = Maker(SIZE, torch.float32)
    x, p = m.tokens(), m.restarts()
    whole, state = ops.ema_scan(x, p), torch.zeros_like(x[:, 0])
    for i in range(SIZE.N):
        state = p[:, i, None] * x[:, i] + (1 - p[:, i, None]) * state
        torch.testing.assert_close(whole[:, i], state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_in_half_precision_get_their_gradient_in_it(dtype):
    m = Maker(SIZE, dtype)
    x, p = m.tokens(), m.restarts().to(dtype).requires_grad_()
    assert torch.autograd.grad(ops.ema_scan(x, p).sum(), p)[0].dtype == dtype


def test_nothing_to_scan():
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        x, p = place(torch.ones(shape)).requires_grad_(), place(torch.ones(shape[:2])).requires_grad_()
        out = ops.ema_scan(x, p)
        assert out.shape == shape
        assert all(not g.any() for g in torch.autograd.grad(out.sum(), [x, p]))
