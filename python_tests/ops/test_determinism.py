"""The same bits from run to run, for any number of threads, and from several Python threads at once."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from . import simulated
from .cases import LARGE, OPS, SIZES, Maker, forward_backward, native
from .matrix import same_bits


def run(key: str, dtype: torch.dtype, size=LARGE, seed: int = 0) -> list[torch.Tensor]:
    op = OPS[key]
    outputs, gradients = forward_backward(native(op), op, Maker(size, dtype, "ties", seed=seed))
    return [*outputs, *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("key", OPS)
def test_repeats_are_bit_equal_for_any_number_of_threads(key, dtype):
    op = OPS[key]
    for size in (SIZES["odd"], SIZES["keep one"], SIZES["typical"], LARGE):
        torch.set_num_threads(1)
        first = run(key, dtype, size)
        names = [f"output {i}" for i in range(len(first) - len(op.leaves))]
        names += [f"gradient of {name}" for name in op.leaves]
        # The simulated kernels know no threads; each launch has another schedule.
        for threads in (1,) if simulated.VARIANT else (1, 2, 2, 4):
            torch.set_num_threads(threads)
            again = run(key, dtype, size)
            changed = [name for name, a, b in zip(names, first, again, strict=True) if not same_bits(a, b)]
            assert not changed, f"{size}, {threads} threads"


def test_python_threads_that_call_ops_at_once_get_right_answers():
    work = [(key, torch.float32, size, seed) for key in OPS for size in (SIZES["odd"], LARGE) for seed in (0, 1)]
    alone = [run(*job) for job in work]
    torch.set_num_threads(2)
    with ThreadPoolExecutor(2) as pool:
        # The second thread works backwards, so that unlike ops meet.
        forwards = pool.submit(lambda: [run(*job) for job in work])
        backwards = pool.submit(lambda: [run(*job) for job in reversed(work)][::-1])
        for results in (forwards.result(), backwards.result()):
            for job, got, wanted in zip(work, results, alone, strict=True):
                assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True)), job
