"""Loads the compiled library and reports how it was built."""

import importlib.metadata

import torch

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        "shiva_ext's compiled library could not be loaded "
        f"({error}). Build it for this Python and torch {torch.__version__} with 'pip install .' in the checkout, "
        "or install a wheel; torch >= 2.10 is needed."
    ) from error

_C.build_info()  # chooses the CPU code path, so that a wrong SHIVA_CPU_CAPABILITY fails here and not in an op

try:
    __version__ = importlib.metadata.version("shiva_ext")
except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"


def build_info() -> dict:
    """How the compiled library was built and which of its CPU code paths this process uses.

    Returns:
        version, torch_version (running), torch_build_version, torch_target_version (oldest torch that works), compiler,
        cuda (toolkit version or None), cpu_capabilities_built, cpu_capability (chosen; lower it with
        SHIVA_CPU_CAPABILITY=default|avx2|avx512 before the first op).
    """
    return {"version": __version__, "torch_version": torch.__version__, **_C.build_info()}
