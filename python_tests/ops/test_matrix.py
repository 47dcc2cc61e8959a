"""Every op, forward and backward, equals shiva_ext.reference: dtype x layout x content x size x seed."""

import pytest
import torch

from shiva_ext import ops, reference

from .cases import CONTENTS, INDEXED, LARGE, LAYOUTS, OPS, RARE_SIZES, TAU, TYPICAL, Maker, native, tuple_of
from .device import place
from .matrix import complaints, same_bits
from .tolerance import Target, pair_floor

CASES = [pytest.param(key, dtype, id=f"{key}-{dtype}") for key, op in OPS.items() for dtype in op.dtypes]
GRADIENT_CASES = [case for case in CASES if OPS[case.values[0]].leaves]


def report(found: list[str]) -> None:
    assert not found, "\n".join(found[:12])


# The layout varies fastest: the layouts that hold the same values find their targets in the cache.
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize(("key", "dtype"), CASES)
def test_forward_equals_the_reference(key, dtype, content, layout):
    report(complaints(key, dtype, content, layout, backward=False))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize(("key", "dtype"), GRADIENT_CASES)
def test_backward_equals_the_reference(key, dtype, content, layout):
    report(complaints(key, dtype, content, layout, backward=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("key", OPS)
def test_large_inputs_equal_the_reference(key, dtype):
    for backward in (False, True) if OPS[key].leaves else (False,):
        report(complaints(key, dtype, "random", "contiguous", backward, {"large": LARGE}))


@pytest.mark.parametrize(("key", "dtype"), CASES)
def test_rare_sizes_equal_the_reference(key, dtype):
    for backward in (False, True) if OPS[key].leaves else (False,):
        report(complaints(key, dtype, "random", "contiguous", backward, RARE_SIZES))


@pytest.mark.parametrize("key", INDEXED)
def test_int32_indices_are_accepted(key):
    for backward in (False, True):
        report(complaints(key, torch.float32, "random", "sliced", backward, {"typical": TYPICAL}, torch.int32))


@pytest.mark.parametrize(
    ("row", "tau"),
    [
        ([3e38, 3e38, -3e38, 0.0, 1.0], TAU),
        ([1000.0, 1000.5, 999.75, 1000.0], 0.25),
        ([1.0, 2.0, 2.0, -1.0, 0.0, -0.0], 1e-30),
        ([1.0, 2.0, 2.0, -1.0], 1e30),
        ([1e-42, 2e-42, -1e-42, 0.0], 1.0),
        ([0.0] + [-17.0] * 300, 1.0),
        ([0.0] * 300 + [50.0] * 300, 0.01),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_soft_rank_of_extreme_scores_and_temperatures(row, tau, dtype):
    scores, eps = torch.tensor([row], dtype=dtype), torch.finfo(dtype).eps
    exact = reference.soft_rank(scores.double(), tau)
    bound = pair_floor(len(row), eps) + 4 * len(row) ** 0.5 * eps * exact
    report([c for c in [Target(exact, bound, dtype).complaint(ops.soft_rank(place(scores), tau))] if c])


@pytest.mark.parametrize("key", OPS)
def test_the_typed_wrapper_gives_the_same_bits_as_the_raw_op(key):
    op = OPS[key]
    arguments = op.arguments(Maker(TYPICAL, torch.float32))
    for wrapped in (getattr(ops, op.name)(*arguments.values()), getattr(ops, op.name)(**arguments)):
        for a, b in zip(tuple_of(wrapped), tuple_of(native(op)(*arguments.values())), strict=True):
            assert same_bits(a, b)
