"""shiva_ext.reference against a second writing of each formula: loops, torch.topk, finite differences."""

import math
from fractions import Fraction

import pytest
import torch

from shiva_ext import reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
nan, inf = math.nan, math.inf


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def kept_rows(B: int, N: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(B, N, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)[:, :k]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def python_topk(row: list[float], k: int) -> tuple[list[int], list[int]]:
    """Selection by Python's stable sort, with NaN in front of everything."""
    order = sorted(range(len(row)), key=lambda i: (not math.isnan(row[i]), 0 if math.isnan(row[i]) else -row[i]))
    return sorted(order[:k]), sorted(order[k:])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "row",
    [
        [0.0, -0.0, 1.0, -0.0, 0.0, -1.0],
        [nan, inf, 1.0, nan, -inf, inf],
        [2.0] * 7,
        [1.0, 2.0, 1.0, 2.0, 1.0, 2.0],
        [-nan, 3.0, -inf, -inf],
        [5.0],
        [],
    ],
)
def test_topk_select_is_a_stable_sort_with_nan_first(row, dtype):
    for k in range(len(row) + 1):
        kept, rejected = reference.topk_select(torch.tensor([row], dtype=dtype).reshape(1, -1), k)
        assert (kept[0].tolist(), rejected[0].tolist()) == python_topk(row, k)
        assert kept.dtype == rejected.dtype == torch.int64


@pytest.mark.parametrize("dtype", FLOATS)
def test_topk_select_keeps_the_values_of_torch_topk(dtype):
    scores = randn(4, 300, dtype=dtype)
    kept, _ = reference.topk_select(scores, 77)
    assert torch.equal(scores.gather(1, kept).sort(descending=True).values, scores.topk(77).values)


def test_topk_select_with_many_ties_agrees_with_python_on_long_rows():
    scores = (randn(3, 2000) * 2).round()
    kept, rejected = reference.topk_select(scores.to(torch.bfloat16), 700)
    for row, kept_row, rejected_row in zip(scores, kept, rejected, strict=True):
        assert (kept_row.tolist(), rejected_row.tolist()) == python_topk(row.tolist(), 700)


@pytest.mark.parametrize("tau", [0.05, 1.0, 3.0])
def test_soft_rank_is_the_sum_over_pairs(tau):
    scores = randn(2, 9)
    for row, ranks in zip(scores.tolist(), reference.soft_rank(scores, tau).tolist(), strict=True):
        for i, rank in enumerate(ranks):
            expected = 1 + sum(sigmoid((row[j] - row[i]) / tau) for j in range(9) if j != i)
            assert rank == pytest.approx(expected, rel=1e-14)


def test_soft_rank_approaches_the_integer_ranks():
    scores = randn(3, 20)
    ranks = reference.soft_rank(scores, 1e-6)
    torch.testing.assert_close(ranks, scores.argsort(descending=True).argsort().double() + 1)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([nan], [1.0]),
        ([inf], [1.0]),
        ([nan, 1.0, 2.0], [nan, nan, nan]),
        ([1.0, inf, inf, -inf], [3.0, nan, nan, 4.0]),
        ([inf, 0.0, -inf], [1.0, 2.0, 3.0]),
        ([0.0, -0.0], [1.5, 1.5]),
    ],
)
def test_soft_rank_of_special_scores_follows_the_formula(row, expected):
    ranks = reference.soft_rank(torch.tensor([row]), 0.5)
    assert torch.equal(ranks.nan_to_num(nan=-1), torch.tensor([expected]).nan_to_num(nan=-1))


@pytest.mark.parametrize("dtype", FLOATS)
def test_scores_and_ranks_come_in_float32_or_float64(dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert reference.soft_rank(randn(2, 5, dtype=dtype), 0.1).dtype == wide
    vector = randn(3, dtype=dtype)
    context, w_in = randn(2, 3, dtype=dtype), randn(3, 4, dtype=dtype)
    score = reference.router_score(randn(2, 5, 4, dtype=dtype), context, w_in, vector, vector, vector, 1e-5)
    assert score.dtype == wide
    assert reference.soft_rank_backward(randn(2, 5, dtype=wide), randn(2, 5, dtype=dtype), 0.1).dtype == dtype


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_soft_rank_backward_is_the_closed_form_of_autograd(tau):
    scores, grad = randn(3, 12).requires_grad_(), randn(3, 12, seed=1)
    (expected,) = torch.autograd.grad(reference.soft_rank(scores, tau), scores, grad)
    torch.testing.assert_close(reference.soft_rank_backward(grad, scores.detach(), tau), expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_gather_and_scatter_move_rows(dtype, index_dtype):
    base, src, index = randn(2, 6, 3, dtype=dtype), randn(2, 4, 3, seed=1, dtype=dtype), kept_rows(2, 6, 4)
    gathered = reference.token_gather(base, index.to(index_dtype))
    shared = reference.token_gather(base[0], index.to(index_dtype))
    scattered = reference.token_scatter(base, index.to(index_dtype), src)
    expected = base.clone()
    for b in range(2):
        for slot, i in enumerate(index[b].tolist()):
            assert torch.equal(gathered[b, slot], base[b, i])
            assert torch.equal(shared[b, slot], base[0, i])
            expected[b, i] = src[b, slot]
    assert torch.equal(scattered, expected)
    in_place = base.clone()
    assert reference.token_scatter_(in_place, index.to(index_dtype), src) is in_place
    assert torch.equal(in_place, expected)


def test_gradient_of_a_shared_table_is_summed_over_the_batch():
    table, index = randn(6, 3).requires_grad_(), kept_rows(5, 6, 4)
    grad = randn(5, 4, 3, seed=1)
    (got,) = torch.autograd.grad(reference.token_gather(table, index), table, grad)
    expected = torch.zeros(6, 3, dtype=torch.float64)
    for b in range(5):
        for slot, i in enumerate(index[b].tolist()):
            expected[i] += grad[b, slot]
    torch.testing.assert_close(got, expected)


def test_residual_gate_has_the_gradients_of_the_surrogate():
    """The paper's surrogate: pi*x on the selected path, (1-pi)*x on the identity path, each seen only where it ran."""
    x, inclusion, kept = randn(2, 7, 5).requires_grad_(), torch.rand(2, 7).double().requires_grad_(), kept_rows(2, 7, 3)
    selected, base = reference.residual_gate(x, inclusion, kept)
    assert torch.equal(selected, reference.token_gather(x, kept))
    assert torch.equal(base, x)
    grad_selected, grad_base = randn(2, 3, 5, seed=1), randn(2, 7, 5, seed=2)
    grad_x, grad_inclusion = torch.autograd.grad([selected, base], [x, inclusion], [grad_selected, grad_base])
    for b in range(2):
        for i in range(7):
            slots = [slot for slot in range(3) if kept[b, slot] == i]
            gradient = grad_base[b, i].clone()
            for slot in slots:
                gradient += grad_selected[b, slot]
            torch.testing.assert_close(grad_x[b, i], gradient)
            seen = grad_selected[b, slots[0]] if slots else -grad_base[b, i]
            torch.testing.assert_close(grad_inclusion[b, i], seen @ x[b, i])


def test_counterfactual_scatter_has_the_prescribed_gradients():
    base, src, update = randn(2, 7, 5), randn(2, 3, 5, seed=1), randn(2, 7, 5, seed=2)
    inclusion, kept, g, kappa = torch.rand(2, 7).double(), kept_rows(2, 7, 3), randn(2, 7, 5, seed=3), 0.3
    leaves = [t.clone().requires_grad_() for t in (base, src, inclusion)]
    out = reference.counterfactual_scatter(leaves[0], kept, leaves[1], leaves[2], update, kappa)
    assert torch.equal(out, reference.token_scatter(base, kept, src))
    grad_base, grad_src, grad_inclusion = torch.autograd.grad(out, leaves, g)
    for b in range(2):
        slot_of = {int(i): slot for slot, i in enumerate(kept[b])}
        for i in range(7):
            bend = kappa * update[b, i] @ update[b, i]
            if i in slot_of:
                slot = slot_of[i]
                assert torch.equal(grad_src[b, slot], g[b, i])
                assert not grad_base[b, i].any()
                expected = g[b, i] @ (src[b, slot] - base[b, i]) - bend
            else:
                assert torch.equal(grad_base[b, i], g[b, i])
                expected = g[b, i] @ update[b, i] + bend
            torch.testing.assert_close(grad_inclusion[b, i], expected)


def test_the_counterfactual_gradient_is_exact_for_a_quadratic_loss():
    """For L = c/2 |y - y*|^2 and kappa = c/2, processing a token instead of skipping it changes L by the estimate."""
    base, update, target, curvature = randn(1, 6, 4), randn(1, 6, 4, seed=1), randn(1, 6, 4, seed=2), 0.8
    kept = kept_rows(1, 6, 3)
    src = reference.token_gather(base + update, kept)
    inclusion = torch.zeros(1, 6, dtype=torch.float64, requires_grad=True)
    y = reference.counterfactual_scatter(base, kept, src, inclusion, update, curvature / 2)

    def loss(y: torch.Tensor) -> torch.Tensor:
        return curvature / 2 * (y - target).square().sum()

    (estimate,) = torch.autograd.grad(loss(y), inclusion)
    for i in range(6):
        processed, skipped = y.detach().clone(), y.detach().clone()
        processed[0, i], skipped[0, i] = base[0, i] + update[0, i], base[0, i]
        torch.testing.assert_close(estimate[0, i], loss(processed) - loss(skipped))


def test_router_score_is_linear_silu_layernorm_dot():
    x, context, w_in = randn(2, 4, 6), randn(2, 5, seed=1), randn(5, 6, seed=2)
    ln_weight, ln_bias, w_out = randn(5, seed=3), randn(5, seed=4), randn(5, seed=5)
    score = reference.router_score(x, context, w_in, ln_weight, ln_bias, w_out, 1e-3)
    for b in range(2):
        for i in range(4):
            hidden = [float(w_in[j] @ x[b, i] + context[b, j]) for j in range(5)]
            hidden = torch.tensor([h * sigmoid(h) for h in hidden], dtype=torch.float64)
            normed = (hidden - hidden.mean()) / (hidden.var(correction=0) + 1e-3).sqrt()
            torch.testing.assert_close(score[b, i], w_out @ (normed * ln_weight + ln_bias))


def test_gather_modulate_is_layernorm_scale_shift_of_the_gathered_rows():
    x, shift, scale, index = randn(2, 6, 4), randn(2, 4, seed=1), randn(2, 4, seed=2), kept_rows(2, 6, 3)
    out = reference.gather_modulate(x, index, shift, scale, 1e-3)
    for b in range(2):
        for slot, i in enumerate(index[b].tolist()):
            row = x[b, i]
            normed = (row - row.mean()) / (row.var(correction=0) + 1e-3).sqrt()
            torch.testing.assert_close(out[b, slot], normed * (1 + scale[b]) + shift[b])


def test_scatter_residual_adds_the_gated_update_to_its_rows():
    base, update, gate, index = randn(2, 6, 4), randn(2, 3, 4, seed=1), randn(2, 4, seed=2), kept_rows(2, 6, 3)
    expected = base.clone()
    for b in range(2):
        for slot, i in enumerate(index[b].tolist()):
            expected[b, i] += gate[b] * update[b, slot]
    torch.testing.assert_close(reference.scatter_residual(base, index, update, gate), expected)


def test_scatter_mean_is_the_mean_of_each_groups_tokens():
    x, position = randn(2, 7, 3), torch.tensor([[0, 3, 3, 0, 1, 3, 0], [4, 4, 4, 4, 4, 4, 4]])
    mean = reference.scatter_mean(x, position, 5)
    for b in range(2):
        for m in range(5):
            members = [x[b, n] for n in range(7) if position[b, n] == m]
            wanted = sum(members) / len(members) if members else torch.zeros(3, dtype=x.dtype)
            torch.testing.assert_close(mean[b, m], wanted)
    assert reference.scatter_mean(x.half(), position.int(), 5).dtype == torch.float16


def python_facility_location(S: list[list[float]], count: int) -> list[int]:
    """In exact arithmetic, for rows of fractions."""
    n, covered, chosen = len(S), [-1] * len(S), []
    for _ in range(count):
        gains = {j: sum(max(S[i][j] - covered[i], 0) for i in range(n)) for j in range(n) if j not in chosen}
        best = max(gains, key=lambda j: (gains[j], -j))
        chosen.append(best)
        covered = [max(covered[i], S[i][best]) for i in range(n)]
    return sorted(chosen)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [1, 2, 7, 33, 40])
def test_facility_location_is_the_greedy_choice_of_exact_gains(n, dtype):
    S = (randn(3, n, n, seed=n) * 2).round() / 4  # many ties
    for count in (0, 1, n // 2, n):
        chosen = reference.facility_location(S.to(dtype), count)
        assert chosen.dtype == torch.int64 and chosen.shape == (3, count)
        rows = [[[Fraction(v) for v in row] for row in each] for each in S.tolist()]
        assert chosen.tolist() == [python_facility_location(each, count) for each in rows]


def test_facility_location_of_no_tokens_is_empty():
    assert reference.facility_location(torch.zeros(2, 0, 0), 0).shape == (2, 0)


@pytest.mark.parametrize("capacity", [0, 1, 3, 9])
def test_expert_dispatch_and_combine_are_loops(capacity):
    T, K, E, D = 11, 3, 4, 5
    x, weight = randn(T, D), randn(T, K, seed=1)
    experts = torch.randint(E, (T, K), generator=torch.Generator().manual_seed(2))
    lists = [[] for _ in range(E)]
    for t in range(T):
        for j in range(K):
            lists[experts[t, j]].append((t, j))
    rows, place, ends = reference.expert_dispatch(x, experts.int(), E, capacity)
    assert ends.dtype == torch.int32 and place.dtype == torch.int64
    assert ends.tolist() == [sum(map(len, lists[: e + 1])) for e in range(E)]
    wanted = torch.zeros(E * capacity if capacity else T * K, D, dtype=x.dtype)
    where, combined, start = torch.full((T, K), -1), torch.zeros(T, D, dtype=x.dtype), 0
    for e, choices in enumerate(lists):
        kept = choices[:capacity] if capacity else choices
        for slot, (t, j) in enumerate(kept):
            row = e * capacity + slot if capacity else start + slot
            wanted[row], where[t, j] = x[t], row
            combined[t] += weight[t, j] * x[t]
        start += len(choices)
    assert torch.equal(rows, wanted) and torch.equal(place, where)
    torch.testing.assert_close(reference.expert_combine(rows, place, weight), combined)
    assert reference.expert_combine(rows.half(), place.int(), weight.float()).dtype == torch.float16


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("soft_rank", (randn(2, 6), 0.7)),
        ("token_gather", (randn(2, 6, 3), kept_rows(2, 6, 4))),
        ("token_gather", (randn(6, 3), kept_rows(2, 6, 4))),
        ("token_scatter", (randn(2, 6, 3), kept_rows(2, 6, 4), randn(2, 4, 3, seed=1))),
        (
            "router_score",
            (randn(2, 3, 4), randn(2, 5), randn(5, 4), randn(5), randn(5, seed=1), randn(5, seed=2), 1e-2),
        ),
        ("gather_modulate", (randn(2, 6, 4), kept_rows(2, 6, 3), randn(2, 4), randn(2, 4, seed=1), 1e-2)),
        ("scatter_residual", (randn(2, 6, 4), kept_rows(2, 6, 3), randn(2, 3, 4), randn(2, 4, seed=1))),
        ("scatter_mean", (randn(2, 6, 4), kept_rows(2, 6, 6) // 2, 4)),
    ],
)
def test_natural_gradients_match_finite_differences(name, arguments):
    arguments = [a.clone().requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments]
    assert torch.autograd.gradcheck(getattr(reference, name), arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype):
    x, index = randn(2, 6, 64, dtype=dtype), kept_rows(2, 6, 3)
    shift, scale = randn(2, 64, seed=1, dtype=dtype), randn(2, 64, seed=2, dtype=dtype)
    wide = reference.gather_modulate(x.float(), index, shift.float(), scale.float(), 1e-6)
    assert torch.equal(reference.gather_modulate(x, index, shift, scale, 1e-6), wide.to(dtype))
    update = randn(2, 3, 64, seed=3, dtype=dtype)
    wide = reference.scatter_residual(x.float(), index, update.float(), scale.float())
    assert torch.equal(reference.scatter_residual(x, index, update, scale), wide.to(dtype))
    _, grad_inclusion = reference.residual_gate_backward(update, x, x, index)
    assert grad_inclusion.dtype == torch.float32
