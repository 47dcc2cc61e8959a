"""router_score_and_projection: router_score's scores and gradients, with the projection kept on the CPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from shiva_ext import ops

from .cases import DTYPES, EPS, LARGE, LAYOUTS, OPS, SIZES, Maker, Size, wide
from .matrix import same_bits

shiva = torch.ops.shiva


def arguments_of(size: Size, dtype: torch.dtype, layout: str = "contiguous", seed: int = 0) -> list:
    return list(OPS["router_score"].arguments(Maker(size, dtype, layout=layout, seed=seed)).values())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [*SIZES.values(), LARGE], ids=[*SIZES, "large"])
def test_scores_and_gradients_are_those_without_it_bit_for_bit(size, dtype, layout):
    arguments = arguments_of(size, dtype, layout)
    x, _, w_in = arguments[:3]
    score, projection = shiva.router_score_and_projection(*arguments)
    assert same_bits(score, shiva.router_score(*arguments))
    assert projection.shape == (size.B, size.N, size.H) and projection.dtype == dtype
    torch.testing.assert_close(projection, (x.double() @ w_in.double().T).to(dtype))
    before = projection.clone()
    grad = torch.randn(size.B, size.N, dtype=wide(dtype), generator=torch.Generator().manual_seed(1))
    wanted = shiva.router_score_backward(grad, *arguments)
    for kept in (projection, projection.transpose(0, 1).contiguous().transpose(0, 1)):
        got = shiva.router_score_backward(grad, *arguments, kept)
        assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True))
    assert same_bits(projection, before)  # the next backward pass needs it again


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_wrapper_gives_the_gradients_of_the_raw_op_as_often_as_wanted(dtype):
    arguments = arguments_of(SIZES["typical"], dtype)
    leaves = [a.requires_grad_() for a in arguments if torch.is_tensor(a)]
    grad = torch.randn(2, 75, dtype=wide(dtype))
    wanted = torch.autograd.grad(shiva.router_score(*arguments), leaves, grad)
    score = ops.router_score(*arguments)
    for _ in range(2):
        got = torch.autograd.grad(score, leaves, grad, retain_graph=True)
        assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True))


def kept_bytes(call) -> int:
    """Bytes that autograd holds for a call's backward, without the arguments themselves."""
    total, known = 0, set()

    def pack(t):
        nonlocal total
        if t.data_ptr() not in known:
            known.add(t.data_ptr())
            total += t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return total


def test_the_projection_is_kept_only_where_a_gradient_is_wanted():
    size = SIZES["typical"]
    arguments = arguments_of(size, torch.float32)
    assert not ops.router_score(*arguments).requires_grad
    arguments[3].requires_grad_()  # one of them is enough
    more = kept_bytes(lambda: ops.router_score(*arguments)) - kept_bytes(lambda: shiva.router_score(*arguments))
    assert more == 4 * size.B * size.N * size.H
    with torch.no_grad():
        assert not ops.router_score(*arguments).requires_grad


def test_the_projection_has_no_gradient():
    arguments = arguments_of(SIZES["odd"], torch.float64)
    arguments[0].requires_grad_()
    score, projection = shiva.router_score_and_projection(*arguments)
    assert score.requires_grad and not projection.requires_grad


@pytest.mark.parametrize("size", ["typical", "empty batch"])
def test_opcheck(size):
    arguments = arguments_of(SIZES[size], torch.float32)
    grad = torch.randn(SIZES[size].B, SIZES[size].N)
    projection = shiva.router_score_and_projection(*arguments)[1]
    torch.library.opcheck(shiva.router_score_backward.default, (grad, *arguments, projection))
    arguments[0].requires_grad_()
    torch.library.opcheck(shiva.router_score_and_projection.default, tuple(arguments))


def test_on_a_gpu_it_is_empty():
    with FakeTensorMode():
        x, context, w_in, small = (torch.empty(s, device="cuda") for s in ((2, 5, 8), (2, 4), (4, 8), (4,)))
        score, projection = shiva.router_score_and_projection(x, context, w_in, small, small, small, EPS)
    assert score.shape == (2, 5) and projection.shape == (0,) and projection.device.type == "cuda"


def test_a_projection_of_other_arguments_is_refused():
    arguments = arguments_of(SIZES["odd"], torch.float32)
    grad, projection = torch.randn(3, 21), shiva.router_score_and_projection(*arguments)[1]
    for wrong, said in (
        (projection[:, 1:], r"projection must have shape \[3, 21, 7\], got \[3, 20, 7\]"),
        (projection.double(), r"projection must have the dtype of x \(float32\), got float64"),
    ):
        with pytest.raises(RuntimeError, match=said):
            shiva.router_score_backward(grad, *arguments, wrong)


def test_autocast_converts_as_for_the_score():
    arguments = arguments_of(SIZES["odd"], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        score, projection = shiva.router_score_and_projection(*arguments)
        assert same_bits(score, shiva.router_score(*arguments))
    assert projection.dtype == torch.bfloat16
