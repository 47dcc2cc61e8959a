"""What a test does where it needs a GPU and there is none.

A test marked `gpu` is skipped then; with SHIVA_REQUIRE_CUDA=1, for machines that should have a GPU, it fails.
This folder is no package: as `cuda` it would hide NVIDIA's.
"""

import os

import pytest
import torch

import shiva_ext


def missing() -> str:
    """What is missing for a test on a GPU, or an empty string."""
    if not torch.cuda.is_available():
        return f"no GPU (torch {torch.__version__})"
    if shiva_ext.build_info()["cuda"] is None:
        return "no CUDA kernels in this build of shiva_ext: build it with SHIVA_WITH_CUDA=ON"
    return ""


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU; skipped without one, or failed with SHIVA_REQUIRE_CUDA=1")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    if item.get_closest_marker("gpu") is None or not (reason := missing()):
        return
    if os.environ.get("SHIVA_REQUIRE_CUDA") == "1":
        pytest.fail(f"SHIVA_REQUIRE_CUDA=1, but there is {reason}", pytrace=False)
    pytest.skip(reason)
