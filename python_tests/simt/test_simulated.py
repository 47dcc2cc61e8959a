"""The tests of the ops, run on the simulated CUDA kernels: plain, under ASan and UBSan, and under the race detector.

Each build needs a process of its own, as its kernels take the place of the CPU's: see python_tests/ops/simulated.py.
"""

import importlib.machinery
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = Path(os.environ.get("SHIVA_SIMT_DIR") or ROOT / "build" / "simt")
LEAST_SCHEDULES = 20  # of each kernel in each build
# Whether the slow builds run every case too.
NIGHTLY = os.environ.get("SHIVA_NIGHTLY") == "1"

MATRIX, SIZES, INPLACE = (f"python_tests/ops/test_{name}.py" for name in ("matrix", "sizes", "inplace"))
PLAIN = [
    MATRIX,
    SIZES,
    INPLACE,
    *(f"python_tests/ops/test_{name}.py" for name in ("errors", "gradients", "properties", "determinism")),
    *(f"python_tests/ops/test_{name}.py" for name in ("scatter_mean", "facility_location", "expert_rows", "ema_scan")),
    "python_tests/simt/test_geometry.py",
]
# Out-of-bounds accesses and races hang on sizes and strides, hardly on values: the slow builds see a part of the cases.
SLOW = "in_place_writes or rare or digits or 32769 or 50000 or forms"
SELECTIONS = {
    "plain": (PLAIN, ""),
    "asan": ([MATRIX, SIZES, INPLACE], f"{SLOW} or ((random or nan) and (contiguous or sliced) and not large)"),
    "race": ([MATRIX, SIZES, INPLACE], f"{SLOW} or (random and (contiguous or sliced) and not large)"),
}
# Of these, what is left to the nightly run and to the mutants: float16 does what bfloat16 does, float64 is the same
# source as float32 (but its rare sizes count), and strides matter to the width of an access, not to who waits for whom.
NIGHTLY_ALONE = {
    "asan": "torch.float16 or (torch.float64 and (random or nan) and not topk)",
    "race": "torch.float16 or (random and (sliced or (torch.float64 and not topk)))",
}


def load_simulated():
    """The module of the simulated kernels, torch.ops.shiva_simt: the build of SHIVA_SIMT, by default the plain one."""
    name = f"_simt_{os.environ.get('SHIVA_SIMT') or 'plain'}"
    if not any((BUILD / f"{name}{suffix}").is_file() for suffix in importlib.machinery.EXTENSION_SUFFIXES):
        pytest.skip(f"the simulated kernels are not built in {BUILD}: run `make simt`")
    sys.path.insert(0, str(BUILD))
    return importlib.import_module(name)


def kernels_of_the_sources() -> set[str]:
    """Names of all __global__ functions in csrc/cuda."""
    text = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cuh"))
    return set(re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", text))


def compiler_library(name: str) -> str:
    compiler = os.environ.get("CXX", "g++")
    return subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()


def run_ops_tests(variant: str) -> subprocess.CompletedProcess:
    files, chosen = SELECTIONS[variant]
    environment = os.environ | {
        "SHIVA_SIMT": variant,
        "SHIVA_CHECK_INDICES": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    if variant == "asan":
        environment |= {"LD_PRELOAD": compiler_library("libasan.so"), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files]
    if chosen and not NIGHTLY:
        command += ["-k", f"({chosen}) and not ({NIGHTLY_ALONE[variant]})"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("variant", SELECTIONS)
def test_the_ops_tests_pass_on_simulated_cuda_kernels(variant):
    if not any((BUILD / f"_simt_{variant}{suffix}").is_file() for suffix in importlib.machinery.EXTENSION_SUFFIXES):
        pytest.skip(f"the simulated kernels are not built in {BUILD}: run `make simt`")
    done = run_ops_tests(variant)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    assert re.search(r"simulated CUDA \((\w+)\)", done.stdout)[1] == variant and int(passed[1]) > 100
    counts = json.loads(re.search(r"schedule of its own: (\{.*\})", done.stdout)[1])
    assert set(counts) == kernels_of_the_sources()
    seldom = {name: count for name, count in counts.items() if count < LEAST_SCHEDULES}
    assert not seldom, f"launched fewer than {LEAST_SCHEDULES} times under {variant}"
