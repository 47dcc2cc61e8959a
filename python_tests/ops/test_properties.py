"""Properties that hold for any scores, tried by hypothesis."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shiva_ext import ops

from .cases import DTYPES, wide
from .device import place
from .tolerance import pair_floor

few = settings(max_examples=60, deadline=None)
numbers = st.one_of(st.floats(width=16), st.sampled_from([0.0, -0.0, 1.0, -1.0]))
finite = st.one_of(st.floats(-8, 8, width=16), st.sampled_from([0.0, -0.0, 1.0]))
temperatures = st.sampled_from([0.015625, 0.125, 1.0, 16.0])


@st.composite
def scores(draw, values, most_rows=3):
    """[B,N], made of at most ten different values, so that ties are common."""
    B, N = draw(st.integers(1, most_rows)), draw(st.integers(1, 70))
    palette = draw(st.lists(values, min_size=1, max_size=10))
    picks = draw(st.lists(st.sampled_from(palette), min_size=B * N, max_size=B * N))
    return torch.tensor(picks, dtype=torch.float64).reshape(B, N).to(draw(st.sampled_from(DTYPES)))


@st.composite
def selections(draw):
    """Scores of any values, and a k."""
    drawn = draw(scores(numbers))
    return drawn, draw(st.integers(0, drawn.shape[1]))


rankings = st.tuples(scores(finite, most_rows=1), temperatures)


def topk_select(scores: torch.Tensor, k: int) -> list[torch.Tensor]:
    """The op on the device under test; arguments and results are on the CPU."""
    return [t.cpu() for t in ops.topk_select(place(scores), k)]


def soft_rank(scores: torch.Tensor, tau: float) -> torch.Tensor:
    return ops.soft_rank(place(scores), tau).cpu()


def rank_error(scores: torch.Tensor, tau: float) -> float:
    """How far a rank may be off: the pairs' floor, the rounding of their sum, and that of the scores over tau."""
    eps, N = torch.finfo(wide(scores.dtype)).eps, scores.shape[-1]
    return pair_floor(N, eps) + N * eps * (N**0.5 + scores.abs().max().item() / tau / 4)


@few
@given(selections())
def test_kept_and_rejected_split_the_tokens_in_ascending_order(case):
    scores, k = case
    kept, rejected = topk_select(scores, k)
    assert (kept.shape[1], rejected.shape[1]) == (k, scores.shape[1] - k)
    assert (kept.diff(dim=1) > 0).all()
    assert (rejected.diff(dim=1) > 0).all()
    everything = torch.cat([kept, rejected], dim=1).sort(dim=1).values
    assert torch.equal(everything, torch.arange(scores.shape[1]).expand_as(everything))


@few
@given(selections())
def test_no_rejected_token_beats_a_kept_one(case):
    scores, k = case
    kept, rejected = topk_select(scores, k)
    for row, row_kept, row_rejected in zip(scores.tolist(), kept.tolist(), rejected.tolist(), strict=True):
        for i in row_kept:
            for j in row_rejected:
                if row[i] != row[i]:
                    assert row[j] == row[j] or i < j
                else:
                    assert row[i] > row[j] or (row[i] == row[j] and i < j)


@few
@given(selections())
def test_the_kept_values_are_those_of_torch_topk(case):
    scores, k = case
    kept, _ = topk_select(scores, k)
    got = scores.gather(1, kept).sort(dim=1, descending=True).values
    torch.testing.assert_close(got, scores.topk(k).values, rtol=0, atol=0, equal_nan=True)


@few
@given(rankings)
def test_the_ranks_add_up_to_those_of_a_ranking(case):
    scores, tau = case
    N = scores.shape[1]
    ranks = soft_rank(scores, tau).double()
    assert abs(ranks.sum().item() - N * (N + 1) / 2) <= N * rank_error(scores, tau)


@few
@given(rankings)
def test_a_better_score_has_no_larger_rank(case):
    scores, tau = case
    best_first = soft_rank(scores, tau)[0, scores[0].argsort(descending=True, stable=True)]
    assert (best_first.diff() >= -2 * rank_error(scores, tau)).all()
    assert (best_first >= 1 - rank_error(scores, tau)).all()
    assert (best_first <= scores.shape[1] + rank_error(scores, tau)).all()


@few
@given(rankings, st.randoms(use_true_random=False))
def test_permuting_the_scores_permutes_the_ranks(case, random):
    scores, tau = case
    order = list(range(scores.shape[1]))
    random.shuffle(order)
    permuted = soft_rank(scores[:, order], tau)
    error = (permuted - soft_rank(scores, tau)[:, order]).abs().max().item()
    assert error <= 2 * rank_error(scores, tau)
