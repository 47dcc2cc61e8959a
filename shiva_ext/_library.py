"""Loads the compiled library and reports how it was built."""

import importlib.machinery
import importlib.metadata
from pathlib import Path

import torch

from ._fit import cuda_complaint, python_complaint, torch_complaint

try:
    __version__ = importlib.metadata.version("shiva_ext")
except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

if complaint := torch_complaint(torch.__version__):
    raise ImportError(complaint)

try:
    from . import _C
except ImportError as error:
    complaint = python_complaint(Path(__file__).parent, importlib.machinery.EXTENSION_SUFFIXES, __version__)
    raise ImportError(
        complaint
        or f"shiva_ext's compiled library could not be loaded beside torch {torch.__version__} ({error}): "
        f"pip install --force-reinstall --no-deps shiva_ext=={__version__}"
    ) from error

# build_info chooses the CPU code path: a wrong SHIVA_CPU_CAPABILITY fails here and not in an op.
if complaint := cuda_complaint(_C.build_info()["cuda"], torch.version.cuda, __version__):
    raise ImportError(complaint)


def build_info() -> dict:
    """How the compiled library was built and which of its CPU code paths this process uses.

    Returns:
        version, torch_version (running), torch_build_version, torch_target_version (oldest torch that works), compiler,
        git_commit (empty if not built in a checkout), cuda (toolkit version or None), cuda_architectures,
        cpu_capabilities_built, cpu_capability (chosen; lower it with SHIVA_CPU_CAPABILITY=default|avx2|avx512 before
        the first op).
    """
    return {"version": __version__, "torch_version": torch.__version__, **_C.build_info()}
