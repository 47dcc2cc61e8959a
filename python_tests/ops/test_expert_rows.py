"""expert_dispatch and expert_combine beyond the matrix: order, capacity, and a loop over the experts."""

import pytest
import torch
from torch.nn import functional as F

from shiva_ext import ops

from .cases import DTYPES, Maker, Size, wide
from .device import place
from .matrix import same_bits

SIZE = Size(B=2, N=300, k=1, D=40, H=1)


def routed(T: int, K: int, E: int, D: int = 6, seed: int = 0):
    """x [T,D] and distinct experts [T,K] for each token."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, D, generator=generator)
    return place(x), place(torch.rand(T, E, generator=generator).argsort(dim=1)[:, :K])


@pytest.mark.parametrize(("T", "K", "E"), [(1, 1, 1), (7, 2, 4), (333, 2, 16), (500, 8, 300), (200, 3, 1024)])
def test_rows_stand_by_expert_then_token_then_choice(T, K, E):
    x, experts = routed(T, K, E)
    rows, where, ends = (t.cpu() for t in ops.expert_dispatch(x, experts, E))
    wanted, chosen = [], experts.cpu()
    for expert in range(E):
        wanted += [(t, j) for t in range(T) for j in range(K) if chosen[t, j] == expert]
        assert ends[expert] == len(wanted)
    assert [where[choice].item() for choice in wanted] == list(range(T * K))
    assert torch.equal(rows, x.cpu()[[t for t, _ in wanted]])
    assert (rows.shape, where.dtype, ends.dtype) == ((T * K, 6), torch.int64, torch.int32)


@pytest.mark.parametrize("capacity", [1, 5, 40, 500])
def test_a_full_expert_drops_its_later_choices(capacity):
    E = 9
    x, experts = routed(200, 2, E)
    rows, where, ends = (t.cpu() for t in ops.expert_dispatch(x, experts, E, capacity))
    every, open_place, open_ends = (t.cpu() for t in ops.expert_dispatch(x, experts, E))
    assert torch.equal(ends, open_ends)
    start = F.pad(open_ends, (1, -1)).long()[experts.cpu()]
    slot = open_place - start
    assert torch.equal(where, torch.where(slot < capacity, experts.cpu() * capacity + slot, -1))
    counts = open_ends.diff(prepend=torch.zeros(1, dtype=torch.int32)).tolist()
    for expert, (count, all_of_it) in enumerate(zip(counts, every.split(counts), strict=True)):
        mine = rows[expert * capacity : (expert + 1) * capacity]
        kept = min(count, capacity)
        assert torch.equal(mine[:kept], all_of_it[:kept]) and not mine[kept:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_taken_in_the_order_of_the_choices(dtype):
    m = Maker(SIZE, dtype)
    rows, where, weight = m.expert_rows(), m.place(), m.expert_weight()
    values, at, w = (t.cpu().to(wide(dtype)) if t.is_floating_point() else t.cpu() for t in (rows, where, weight))
    # The product may be fused with the sum: in float64 it is exact for the half precisions, elsewhere nearly.
    total = torch.zeros(len(at), SIZE.D, dtype=torch.float64)
    for j in range(at.shape[1]):
        some = at[:, j] >= 0
        total[some] += w[some, j, None].double() * values[at[some, j]].double()
    got = ops.expert_combine(rows, where, weight).cpu()
    # A sum near a tie of the half precision may go the other way.
    tolerance = {torch.float32: 4e-7, torch.float64: 1e-15}.get(dtype, torch.finfo(dtype).eps / 2)
    torch.testing.assert_close(got, total.to(dtype), rtol=tolerance * 4, atol=tolerance)


def test_there_and_back_gives_each_token_times_the_sum_of_its_weights():
    x, experts = routed(301, 4, 12)
    weight = place(torch.rand(301, 4, generator=torch.Generator().manual_seed(1)))
    rows, where, _ = ops.expert_dispatch(x, experts, 12)
    torch.testing.assert_close(ops.expert_combine(rows, where, weight), x * weight.sum(dim=1, keepdim=True))


def test_a_layer_of_experts_equals_the_loop_over_them_with_its_gradients():
    T, K, E, D = 257, 2, 6, 16
    x, experts = routed(T, K, E, D)
    generator = torch.Generator().manual_seed(2)
    weight = place(torch.rand(T, K, generator=generator))
    matrices = place(torch.randn(E, D, D, generator=generator) / 4)
    incoming = place(torch.randn(T, D, generator=generator))

    def ours(x, weight, matrices):
        rows, where, ends = ops.expert_dispatch(x, experts, E)
        parts = rows.split(ends.diff(prepend=ends.new_zeros(1)).tolist())
        results = torch.cat([F.silu(part @ matrix) for part, matrix in zip(parts, matrices, strict=True)])
        return ops.expert_combine(results, where, weight)

    def loop(x, weight, matrices):
        out = torch.zeros_like(x)
        for expert in range(E):
            token, choice = (experts == expert).nonzero(as_tuple=True)
            result = F.silu(x[token] @ matrices[expert]) * weight[token, choice, None]
            out = out.index_add(0, token, result)
        return out

    found = []
    for function in (ours, loop):
        leaves = [t.clone().requires_grad_() for t in (x, weight, matrices)]
        out = function(*leaves)
        found.append([out, *torch.autograd.grad(out, leaves, incoming)])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("capacity", [None, 3])
@pytest.mark.parametrize(("T", "K"), [(0, 2), (4, 0), (0, 0)])
def test_no_choices_leave_no_rows_or_empty_ones(T, K, capacity):
    x, experts = place(torch.ones(T, 5)).requires_grad_(), place(torch.zeros(T, K, dtype=torch.int64))
    rows, where, ends = ops.expert_dispatch(x, experts, 4, capacity)
    assert rows.shape == (12 if capacity else 0, 5) and not rows.any()
    assert where.shape == (T, K) and ends.tolist() == [0, 0, 0, 0]
    back = ops.expert_combine(rows, where, place(torch.ones(T, K)))
    assert back.shape == (T, 5) and not back.any()
    assert torch.equal(torch.autograd.grad(back.sum(), x)[0], torch.zeros_like(x))


def test_all_choices_may_go_to_one_expert():
    x, _ = routed(700, 2, 4)
    everything = place(torch.full((700, 2), 2))
    rows, where, ends = (t.cpu() for t in ops.expert_dispatch(x, everything, 4))
    assert ends.tolist() == [0, 0, 1400, 1400]
    assert torch.equal(where, torch.arange(1400).view(700, 2))
    assert torch.equal(rows, x.cpu().repeat_interleave(2, dim=0))


def test_a_bad_value_stays_with_its_token_and_its_weight():
    x, experts = routed(50, 2, 5)
    x[3, 1], x[9, 0] = torch.nan, torch.inf
    weight = place(torch.ones(50, 2))
    weight[20, 1] = torch.nan
    rows, where, _ = ops.expert_dispatch(x, experts, 5)
    got = ops.expert_combine(rows, where, weight).cpu()
    wanted = 2 * x.cpu()
    wanted[20] = torch.nan
    torch.testing.assert_close(got, wanted, equal_nan=True)


def test_a_dropped_choice_adds_nothing_whatever_its_weight():
    rows, where = place(torch.full((2, 3), torch.nan)), place(torch.tensor([[-1, -1]]))
    weight = place(torch.tensor([[torch.nan, torch.inf]])).requires_grad_()
    out = ops.expert_combine(rows.requires_grad_(), where, weight)
    assert same_bits(out.cpu(), torch.zeros(1, 3))
    grads = torch.autograd.grad(out, [rows, weight], torch.full_like(out, torch.nan))
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_weight_in_half_precision_gets_its_gradient_in_it(dtype):
    m = Maker(SIZE, dtype)
    weight = m.expert_weight().to(dtype).requires_grad_()
    out = ops.expert_combine(m.expert_rows(), m.place(), weight)
    assert torch.autograd.grad(out.sum(), weight)[0].dtype == dtype
