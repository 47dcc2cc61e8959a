"""The simulated CUDA kernels beside the CPU kernels: indices and copies bit for bit, values closely.

Both are also held against the reference in float64, by the tests of the ops. What is measured here is what a user sees
who moves from the CPU to a GPU; units.py has the bounds.
"""

import pytest
import torch
from ops.cases import DTYPES, OPS, SIZES, Maker, forward_backward, native, wide
from ops.matrix import same_bits
from units import most_units, units_apart

from .test_simulated import load_simulated


@pytest.fixture(scope="module")
def simulated():
    return load_simulated()


def on_simulated_kernels(simulated, op, maker):
    """forward_backward, with the kernels of torch.ops.shiva replaced for the while."""
    library = torch.library.Library("shiva", "IMPL")
    for schema in torch._C._jit_get_all_schemas():
        name = schema.name.removeprefix("shiva_simt::")
        if name != schema.name:
            library.impl(name, getattr(torch.ops.shiva_simt, name).default, "CPU", allow_override=True)
    before = simulated.launches_run()
    try:
        results = forward_backward(native(op), op, maker)
    finally:
        library._destroy()
    assert simulated.launches_run() > before
    return results


@pytest.mark.parametrize("size", ["odd", "typical"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key", OPS)
def test_cuda_gives_what_the_cpu_gives(simulated, key, dtype, size):
    op = OPS[key]
    before = simulated.launches_run()
    cpu = forward_backward(native(op), op, Maker(SIZES[size], dtype))
    assert simulated.launches_run() == before
    cuda = on_simulated_kernels(simulated, op, Maker(SIZES[size], dtype))
    eps = torch.finfo(dtype if op.rounds_hidden else wide(dtype)).eps
    for part, exact in ((0, op.copies or not op.leaves), (1, op.copies_gradient)):
        for got, wanted in zip(cuda[part], cpu[part], strict=True):
            assert got.dtype == wanted.dtype
            if exact:
                assert same_bits(got.detach(), wanted.detach())
            else:
                units = units_apart(got.detach(), wanted.detach(), eps)
                assert units <= most_units(op.name), f"{units:.1f} units apart"
