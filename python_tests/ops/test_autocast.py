"""What the ops run in under torch.autocast."""

import pytest
import torch

from shiva_ext import ops

from .cases import EPS, EXPERTS, KAPPA, TAU, TYPICAL, Maker
from .device import DEVICE
from .matrix import same_bits

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def autocast(one_thread):
    with torch.autocast(DEVICE.type, BF16):
        yield


def outside(function, *arguments):
    with torch.autocast(DEVICE.type, enabled=False):
        return function(*arguments)


def test_selection_sees_the_scores_it_was_given():
    scores = 1 + torch.arange(50.0, device=DEVICE).flip(0)[None] * 1e-6  # one value in bfloat16
    kept, _ = ops.topk_select(scores, 5)
    assert kept.tolist() == [[0, 1, 2, 3, 4]]


def test_facility_location_sees_the_similarity_it_was_given():
    similarity = torch.eye(50, device=DEVICE)[None] * (1 + torch.arange(50.0, device=DEVICE) * 1e-6)
    assert ops.facility_location(similarity, 5).tolist() == [[45, 46, 47, 48, 49]]


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_soft_rank_runs_in_float32_on_the_scores_it_was_given(dtype):
    scores = Maker(TYPICAL, dtype).scores()
    ranks = ops.soft_rank(scores, TAU)
    assert ranks.dtype == (F64 if dtype == F64 else F32)
    assert same_bits(ranks, outside(ops.soft_rank, scores, TAU))
    leaf = scores.clone().requires_grad_()
    assert torch.autograd.grad(ops.soft_rank(leaf, TAU).square().sum(), leaf)[0].dtype == dtype


def test_router_score_casts_tokens_and_input_weight_to_the_autocast_dtype():
    m = Maker(TYPICAL, F32)
    x, context, w_in = m.tokens(), m.floats(m.H), m.weight(m.H, m.D)
    vectors = [m.weight(m.H) for _ in range(3)]
    expected = outside(ops.router_score, x.to(BF16), context, w_in.to(BF16), *vectors, EPS)
    for given in (x, x.to(BF16)):
        score = ops.router_score(given, context, w_in, *vectors, EPS)
        assert score.dtype == F32
        assert same_bits(score, expected)


def test_router_score_gradients_come_back_in_the_dtypes_of_the_parameters():
    m = Maker(TYPICAL, F32)
    leaves = [m.tokens(), m.floats(m.H), m.weight(m.H, m.D), *[m.weight(m.H) for _ in range(3)]]
    leaves = [t.requires_grad_() for t in leaves]
    score = ops.router_score(*leaves, EPS)
    for grad, leaf in zip(torch.autograd.grad(score.sum(), leaves), leaves, strict=True):
        assert grad.dtype == F32
        assert grad.shape == leaf.shape
        assert grad.any()


@pytest.mark.parametrize("widest", [F32, F64], ids=str)
@pytest.mark.parametrize("narrow", [0, 2])
def test_token_scatter_promotes_to_the_widest(narrow, widest):
    m = Maker(TYPICAL, widest)
    arguments = [m.tokens(), m.index(), m.floats(m.k, m.D)]
    arguments[narrow] = arguments[narrow].to(BF16)
    expected = outside(ops.token_scatter, arguments[0].to(widest), arguments[1], arguments[2].to(widest))
    assert same_bits(ops.token_scatter(*arguments), expected)


@pytest.mark.parametrize("narrow", [0, 2, 4])
def test_counterfactual_scatter_promotes_to_the_widest(narrow):
    m = Maker(TYPICAL, F32)
    tensors = [m.tokens(), m.index(), m.floats(m.k, m.D), m.inclusion(), m.tokens()]
    tensors[narrow] = tensors[narrow].to(BF16)
    wide = [t.float() if t.is_floating_point() else t for t in tensors]
    assert same_bits(ops.counterfactual_scatter(*tensors, KAPPA), outside(ops.counterfactual_scatter, *wide, KAPPA))


@pytest.mark.parametrize("narrow", [0, 2, 3])
def test_scatter_residual_promotes_to_the_widest(narrow):
    m = Maker(TYPICAL, F32)
    tensors = [m.tokens(), m.index(), m.floats(m.k, m.D), m.floats(m.D)]
    tensors[narrow] = tensors[narrow].to(BF16)
    wide = [t.float() if t.is_floating_point() else t for t in tensors]
    assert same_bits(ops.scatter_residual(*tensors), outside(ops.scatter_residual, *wide))


@pytest.mark.parametrize("narrow", [0, 2, 3])
def test_gather_modulate_promotes_to_the_widest(narrow):
    m = Maker(TYPICAL, F32)
    tensors = [m.tokens(), m.index(), m.floats(m.D), m.floats(m.D)]
    tensors[narrow] = tensors[narrow].to(BF16)
    wide = [t.float() if t.is_floating_point() else t for t in tensors]
    assert same_bits(ops.gather_modulate(*tensors, EPS), outside(ops.gather_modulate, *wide, EPS))


def test_promoted_arguments_get_gradients_in_their_own_dtype():
    m = Maker(TYPICAL, F32)
    base, index, src = m.tokens().requires_grad_(), m.index(), m.floats(m.k, m.D).to(BF16).requires_grad_()
    grad_base, grad_src = torch.autograd.grad(ops.token_scatter(base, index, src).sum(), [base, src])
    assert (grad_base.dtype, grad_src.dtype) == (F32, BF16)


def test_the_in_place_scatter_keeps_the_dtype_of_its_base():
    m = Maker(TYPICAL, F32)
    base, index, src = m.tokens(), m.index(), m.floats(m.k, m.D).to(BF16)
    expected = outside(ops.token_scatter, base, index, src.float())
    ops.token_scatter_(base, index, src)
    assert same_bits(base, expected)


def test_gathering_and_merging_keep_the_dtype():
    m = Maker(TYPICAL, F32)
    x, kept, inclusion = m.tokens(), m.index(), m.inclusion()
    assert ops.token_gather(x, kept).dtype == F32
    assert ops.scatter_mean(x, m.groups(), m.num_groups).dtype == F32
    assert ops.expert_dispatch(m.list_of_tokens(), m.experts(), EXPERTS)[0].dtype == F32
    assert all(out.dtype == BF16 for out in ops.residual_gate(x.to(BF16), inclusion, kept))


@pytest.mark.parametrize(("rows", "weight"), [(BF16, F32), (F32, BF16), (BF16, BF16)], ids=str)
def test_expert_combine_weighs_in_the_dtype_of_its_sums(rows, weight):
    m = Maker(TYPICAL, F32)
    arguments = m.expert_rows().to(rows), m.place(), m.expert_weight().to(weight)
    expected = outside(ops.expert_combine, *arguments[:2], arguments[2].float())
    assert expected.dtype == rows and same_bits(ops.expert_combine(*arguments), expected)
