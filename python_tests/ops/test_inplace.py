"""token_scatter_, the op that writes into its argument."""

import pytest
import torch

from shiva_ext import ops, reference

from .cases import CONTENTS, DTYPES, OPS, SIZES, TYPICAL, Maker, lay_out
from .device import host, place
from .matrix import bits, same_bits


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded"])
@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_writes_what_token_scatter_returns(dtype, content, layout):
    for size in SIZES.values():
        arguments = OPS["token_scatter"].arguments(Maker(size, dtype, content, layout))
        arguments["base"] = arguments["base"].contiguous()
        expected = reference.token_scatter(*(bits(host(a)) for a in arguments.values()))
        torch.ops.shiva.token_scatter_(*arguments.values())
        assert torch.equal(bits(host(arguments["base"])), expected), size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_writes_through_a_view_and_nowhere_else(dtype):
    m = Maker(TYPICAL, dtype)
    whole, index, src = m.floats(m.N + 7, m.D + 3), m.index(), m.floats(m.k, m.D)
    expected = whole.clone().cpu()
    part = expected[:, 5 : 5 + m.N, 2 : 2 + m.D]
    part.copy_(reference.token_scatter(part, index.cpu(), src.cpu()))
    view = whole[:, 5 : 5 + m.N, 2 : 2 + m.D]
    assert ops.token_scatter_(view, index, src) is view
    assert same_bits(whole.cpu(), expected)


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_in_place_writes_through_any_strides(layout):
    m = Maker(TYPICAL, torch.float32)
    base, index, src = lay_out(m.tokens(), layout), m.index(), m.floats(m.k, m.D)
    expected = reference.token_scatter(base.cpu(), index.cpu(), src.cpu())
    ops.token_scatter_(base, index, src)
    assert same_bits(base.cpu().contiguous(), expected)


def small() -> dict[str, torch.Tensor]:
    """Zeros, two of whose rows become ones."""
    arguments = {"base": torch.zeros(2, 5, 3), "index": torch.tensor([[0], [1]]), "src": torch.ones(2, 1, 3)}
    return {name: place(a) for name, a in arguments.items()}


def test_in_place_refuses_a_base_whose_rows_share_memory():
    arguments = small()
    arguments["base"] = arguments["base"][:1].expand(2, 5, 3)
    with pytest.raises((RuntimeError, ValueError), match=r"token_scatter_.*base"):
        ops.token_scatter_(**arguments)


def test_in_place_writes_into_a_single_row_of_any_stride():
    base = place(torch.zeros(20)).as_strided((1, 5, 4), (0, 4, 1))
    torch.ops.shiva.token_scatter_(base, place(torch.tensor([[3]])), place(torch.ones(1, 1, 4)))
    assert base.sum(dim=(0, 2)).tolist() == [0, 0, 0, 4, 0]


@pytest.mark.parametrize("name", ["base", "src"])
def test_in_place_refuses_arguments_that_need_a_gradient(name):
    arguments = small()
    arguments[name].requires_grad_()
    with pytest.raises(RuntimeError, match=r"token_scatter_.*gradient.*use token_scatter"):
        ops.token_scatter_(**arguments)
    with torch.no_grad():
        ops.token_scatter_(**arguments)
    assert arguments["base"].sum() == 6


def test_in_place_works_under_inference_mode():
    with torch.inference_mode():
        arguments = small()
        ops.token_scatter_(**arguments)
    assert arguments["base"].sum() == 6


def test_in_place_marks_the_base_as_changed_for_autograd():
    arguments = small()
    product = torch.ones_like(arguments["base"], requires_grad=True) * arguments["base"]
    with torch.no_grad():
        ops.token_scatter_(**arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("start", [0, 3])
def test_in_place_reads_a_source_within_the_base_before_it_writes(start):
    m = Maker(TYPICAL, torch.float32)
    base, index = m.tokens(), m.index()
    src = base[:, start : start + m.k]
    expected = reference.token_scatter(base.cpu(), index.cpu(), src.cpu().clone())
    ops.token_scatter_(base, index, src)
    assert same_bits(base.cpu(), expected)
