"""The tests of the ops, run with their tensors on the GPU: see python_tests/ops/device.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ops.cases import LAYOUTS, OPS, SIZES, Maker

ROOT = Path(__file__).parents[2]
FILES = ("matrix", "sizes", "errors", "gradients", "properties", "inplace", "determinism", "autocast", "registration")


def run_pytest(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FILES)
def test_the_ops_tests_pass_on_the_gpu(name):
    # To look at an index waits for the device: elsewhere the kernels run as they do in use.
    checks = "1" if name == "errors" else "0"
    done = run_pytest(f"python_tests/ops/test_{name}.py", SHIVA_TEST_DEVICE="cuda", SHIVA_CHECK_INDICES=checks)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    allocations = re.search(r"device under test \(cuda\): (\d+) allocations", done.stdout)
    assert allocations and int(allocations[1]) > 2 * int(passed[1])


# What follows needs no GPU.


@pytest.mark.parametrize(("required", "outcome"), [("0", "1 skipped"), ("1", "1 failed")])
def test_a_required_gpu_that_is_missing_is_a_failure(required, outcome):
    test = "python_tests/cuda/test_cuda.py::test_soft_rank_holds_memory_of_order_n"
    done = run_pytest("-rsf", test, SHIVA_REQUIRE_CUDA=required, CUDA_VISIBLE_DEVICES="")
    assert outcome in done.stdout and "no GPU" in done.stdout, done.stdout + done.stderr
    assert done.returncode == int(required)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("key", OPS)
def test_a_case_is_wholly_on_the_wanted_device_and_laid_out_as_on_the_cpu(key, layout):
    for size in SIZES.values():
        for dtype in OPS[key].dtypes:
            here = OPS[key].arguments(Maker(size, dtype, layout=layout))
            there = OPS[key].arguments(Maker(size, dtype, layout=layout, device=torch.device("meta")))
            for name, a in here.items():
                if torch.is_tensor(a):
                    b = there[name]
                    assert b.device.type == "meta" and (a.shape, a.dtype) == (b.shape, b.dtype)
                    assert (a.stride(), a.storage_offset()) == (b.stride(), b.storage_offset())
