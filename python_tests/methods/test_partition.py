"""Groups of tokens: against loops over tokens, and what must hold for any."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shiva_ext.methods.partition import (
    KEEP,
    MEAN,
    MLERP,
    best_destination,
    partition,
    window_destinations,
    window_of_tokens,
)

SHAPES = st.tuples(st.integers(1, 3), st.integers(2, 6), st.integers(2, 6), st.integers(1, 8))


def matched(shape, r_share=1.0, how=MEAN, key=(0, 1, 0.5)):
    """A partition of random tokens as ToMeSD makes it."""
    B, height, width, D = shape
    x = torch.randn(B, height * width, D)
    destinations = window_destinations((height, width), 2, B, key, x.device)
    score, nearest = best_destination(x, destinations)
    r = int(r_share * (x.shape[1] - destinations.shape[1]))
    return x, destinations, score, nearest, partition(score, nearest, r, how), r


def groups_of(groups, b):
    """The tokens of each group of sample b, leader first."""
    found = {int(leader): [int(leader)] for leader in groups.leaders[b]}
    for token in groups.merged[b].tolist():
        found[int(groups.leaders[b, groups.position[b, token]])].append(token)
    return list(found.values())


@settings(deadline=None, max_examples=60)
@given(SHAPES, st.floats(0, 1), st.integers(0, 9))
def test_the_most_alike_tokens_join_their_most_alike_destination(shape, share, seed):
    torch.manual_seed(seed)
    x, destinations, _, _, groups, r = matched(shape, share)
    unit = torch.nn.functional.normalize(x, dim=-1)
    for b in range(len(x)):
        chosen = destinations[b].tolist()
        likeness = {
            i: max((float(unit[b, i] @ unit[b, j]), -j) for j in chosen) for i in range(x.shape[1]) if i not in chosen
        }
        merged = groups.merged[b].tolist()
        assert len(merged) == r and not set(merged) & set(chosen)
        worst = min((likeness[i][0] for i in merged), default=2)
        assert all(likeness[i][0] <= worst + 1e-6 for i in likeness if i not in merged)
        for i in merged:
            joined = int(groups.leaders[b, groups.position[b, i]])
            assert joined in chosen and float(unit[b, i] @ unit[b, joined]) >= likeness[i][0] - 1e-6
        assert groups.leaders[b].tolist() == sorted(set(range(x.shape[1])) - set(merged))


@settings(deadline=None, max_examples=40)
@given(SHAPES, st.sampled_from([MEAN, KEEP, MLERP]), st.integers(0, 9))
def test_merge_against_a_loop_over_groups(shape, how, seed):
    torch.manual_seed(seed)
    x, *_, groups, _ = matched(shape, how=how)
    merged = groups.merge(x)
    for b in range(len(x)):
        for row, members in zip(merged[b], groups_of(groups, b), strict=True):
            wanted = x[b, members].mean(dim=0)
            if how == KEEP:
                wanted = x[b, members[0]]
            elif how == MLERP:  # the direction of the mean, the largest norm of the group, its leader included
                wanted = wanted / wanted.norm() * x[b, members].norm(dim=-1).max()
            torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", [MEAN, KEEP, MLERP])
def test_equal_tokens_come_back_as_they_were_and_unmerging_copies(how):
    x, *_, groups, r = matched((2, 4, 6, 3), how=how)
    same = torch.ones_like(x)
    torch.testing.assert_close(groups.unmerge(groups.merge(same)), same)
    y = torch.randn(2, x.shape[1] - r, 5)
    full = groups.unmerge(y)
    for b in range(2):
        for row, members in zip(y[b], groups_of(groups, b), strict=True):
            assert all(torch.equal(full[b, i], row) for i in members)


def test_nothing_merged_changes_no_bit():
    x, *_, groups, r = matched((2, 4, 4, 8), 0.0)
    assert r == 0
    assert torch.equal(groups.unmerge(groups.merge(x)), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_are_kept(dtype):
    for how in (MEAN, KEEP, MLERP):
        x, *_, groups, _ = matched((2, 4, 4, 8), how=how)
        merged = groups.merge(x.to(dtype))
        assert merged.dtype == groups.unmerge(merged).dtype == dtype


def test_merging_has_the_gradient_of_a_mean():
    x, *_, groups, _ = matched((1, 4, 4, 3))
    x = x.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: groups.unmerge(groups.merge(t)), x)


def test_each_window_has_one_destination_the_same_for_all_samples():
    found = window_destinations((6, 7), 2, 3, (0, 1, 0.25), "cpu")
    assert found.shape == (3, 9) and torch.equal(found[0], found[2])
    windows = [(int(i) // 7 // 2, int(i) % 7 // 2) for i in found[0]]
    assert sorted(windows) == [(r, c) for r in range(3) for c in range(3)]  # the seventh column has none
    other = window_destinations((6, 7), 2, 3, (0, 2, 0.25), "cpu")
    assert not torch.equal(found, other)
    top_left = window_destinations((4, 4), 2, 1, None, "cpu")
    assert top_left.tolist() == [[0, 2, 8, 10]]


def test_random_destinations_are_even():
    counts = torch.zeros(4)
    for layer in range(200):
        found = window_destinations((8, 8), 2, 1, (0, layer, 0.5), "cpu")[0]
        offset = found // 8 % 2 * 2 + found % 8 % 2
        counts += torch.bincount(offset, minlength=4)
    assert ((counts / counts.sum() - 0.25).abs() < 0.03).all()


def test_windows_hold_their_tokens():
    assert window_of_tokens((2, 5), 2, "cpu").tolist() == [[0, 1, 5, 6], [2, 3, 7, 8]]
