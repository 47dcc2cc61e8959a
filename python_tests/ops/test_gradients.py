"""Gradients beyond the matrix: finite differences, the prescribed formulas, partial use of outputs and inputs."""

import pytest
import torch

from shiva_ext import ops, reference

from .cases import DIFFERENTIABLE, EPS, KAPPA, OPS, TYPICAL, Maker, Size, floating, forward_backward, native, tuple_of
from .device import DEVICE, host, place
from .matrix import same_bits

SMALL = Size(B=2, N=6, k=4, D=3, H=5)
PRESCRIBED = ("residual_gate", "counterfactual_scatter")
HALVES_AND_FLOATS = (torch.float32, torch.bfloat16, torch.float64)


@pytest.mark.parametrize("key", [key for key in DIFFERENTIABLE if key not in PRESCRIBED])
def test_natural_gradients_match_finite_differences(key):
    op = OPS[key]
    arguments, _ = op.split(op.arguments(Maker(SMALL, torch.float64)))
    if op.name == "soft_rank":
        arguments["tau"] = 1.0
    assert torch.autograd.gradcheck(native(op), list(arguments.values()))


@pytest.mark.parametrize("dtype", HALVES_AND_FLOATS, ids=str)
def test_residual_gate_backward_is_the_prescribed_formula(dtype):
    m = Maker(TYPICAL, dtype)
    x, kept, grad_selected, grad_base = m.tokens(), m.index(), m.floats(m.k, m.D), m.tokens()
    grad_x, grad_inclusion = torch.ops.shiva.residual_gate_backward(grad_selected, grad_base, x, kept)
    wide = [t.cpu().double() for t in (grad_selected, grad_base, x)]
    exact_x, exact_inclusion = reference.residual_gate_backward(*wide, kept.cpu())
    torch.testing.assert_close(grad_x.cpu(), exact_x.to(dtype))
    torch.testing.assert_close(grad_inclusion.cpu(), exact_inclusion.to(grad_inclusion.dtype))


@pytest.mark.parametrize("dtype", HALVES_AND_FLOATS, ids=str)
def test_counterfactual_scatter_backward_is_the_prescribed_formula(dtype):
    m = Maker(TYPICAL, dtype)
    grad, base, kept, src, update = m.tokens(), m.tokens(), m.index(), m.floats(m.k, m.D), m.tokens()
    got = torch.ops.shiva.counterfactual_scatter_backward(grad, base, kept, src, update, KAPPA)
    got = [t.cpu() for t in got]
    wide = [t.cpu().double() for t in (grad, base, src, update)]
    exact = reference.counterfactual_scatter_backward(wide[0], wide[1], kept.cpu(), wide[2], wide[3], KAPPA)
    assert same_bits(got[0], exact[0].to(dtype))
    assert same_bits(got[1], exact[1].to(dtype))
    torch.testing.assert_close(got[2], exact[2].to(got[2].dtype))


@pytest.mark.parametrize("key", DIFFERENTIABLE)
def test_a_sum_of_the_outputs_gives_the_gradients_of_ones(key):
    op = OPS[key]
    arguments, leaves = op.split(op.arguments(Maker(TYPICAL, torch.float32)))
    outputs = floating(tuple_of(native(op)(*arguments.values())))
    expanded = torch.autograd.grad(sum(out.sum() for out in outputs), leaves, retain_graph=True)
    ones = torch.autograd.grad(outputs, leaves, [torch.ones_like(out) for out in outputs])
    assert all(same_bits(a, b) for a, b in zip(expanded, ones, strict=True))


@pytest.mark.parametrize("key", DIFFERENTIABLE)
def test_each_input_may_be_the_only_one_that_needs_a_gradient(key):
    op = OPS[key]
    everything = forward_backward(native(op), op, Maker(SMALL, torch.float32))[1]
    for name, expected in zip(op.leaves, everything, strict=True):
        maker = Maker(SMALL, torch.float32)
        arguments = op.arguments(maker)
        arguments[name] = arguments[name].detach().requires_grad_()
        outputs = tuple_of(native(op)(*arguments.values()))
        (got,) = torch.autograd.grad(floating(outputs), arguments[name], maker.gradients(outputs, "random"))
        assert same_bits(got, expected)


@pytest.mark.parametrize("key", DIFFERENTIABLE)
def test_a_second_derivative_is_refused(key):
    op = OPS[key]
    arguments, leaves = op.split(op.arguments(Maker(SMALL, torch.float64)))
    outputs = floating(tuple_of(native(op)(*arguments.values())))
    loss = sum(out.square().sum() for out in outputs)
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, create_graph=True)
    assert all(same_bits(a, b.detach()) for a, b in zip(once, again, strict=True))
    with pytest.raises(RuntimeError, match=rf"shiva\.{op.name} has no second derivative"):
        sum(grad.square().sum() for grad in again).backward()


@pytest.mark.parametrize("used", [0, 1])
def test_residual_gate_takes_an_unused_output_as_a_zero_gradient(used):
    m = Maker(SMALL, torch.float64)
    arguments = [m.tokens(), m.inclusion(), m.index()]
    got, wanted = [], []
    for function, grads, where in ((ops.residual_gate, got, DEVICE), (reference.residual_gate, wanted, "cpu")):
        x, inclusion, kept = (t.clone().to(where) for t in arguments)
        leaves = [x.requires_grad_(), inclusion.requires_grad_()]
        grads += map(host, torch.autograd.grad(function(*leaves, kept)[used].square().sum(), leaves))
    torch.testing.assert_close(got, wanted)


def test_selection_carries_no_gradient():
    kept, rejected = ops.topk_select(place(torch.randn(2, 9)).requires_grad_(), 4)
    assert not kept.requires_grad
    assert not rejected.requires_grad
    assert not ops.facility_location(place(torch.randn(2, 9, 9)).requires_grad_(), 4).requires_grad


def test_no_gradient_flows_into_the_teacher_update():
    m = Maker(SMALL, torch.float32)
    base, update = m.tokens().requires_grad_(), m.tokens().requires_grad_()
    out = ops.counterfactual_scatter(base, m.index(), m.floats(m.k, m.D), m.inclusion(), update, KAPPA)
    assert torch.autograd.grad(out.sum(), update, allow_unused=True) == (None,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gradients_are_summed_in_float32(dtype):
    """256 ones would stop growing at 2048 in float16 and at 256 in bfloat16 if each addition were rounded."""
    B, N, D = 4096, 2, 8
    on = dict(dtype=dtype, device=DEVICE)
    table, index = torch.ones(N, D, **on, requires_grad=True), torch.zeros(B, 1, dtype=torch.int64, device=DEVICE)
    every = torch.arange(B, device=DEVICE)[None]
    (grad,) = torch.autograd.grad(ops.token_gather(table, index).sum(), table)
    assert grad[0].eq(B).all()
    base, update = torch.zeros(1, B, D, **on), torch.ones(1, B, D, **on)
    gate = torch.ones(1, D, **on, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.scatter_residual(base, every, update, gate).sum(), gate)
    assert grad.eq(B).all()
    shift, scale = torch.zeros(1, D, **on, requires_grad=True), torch.zeros(1, D, **on)
    (grad,) = torch.autograd.grad(ops.gather_modulate(update, every, shift, scale, EPS).sum(), shift)
    assert grad.eq(B).all()
