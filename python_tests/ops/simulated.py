"""Puts the simulated CUDA kernels in the place of the CPU kernels, so that every test of the ops runs on them.

``SHIVA_SIMT=plain`` (or asan, race) chooses the build, see cmake/ShivaSimt.cmake; it lies in ``SHIVA_SIMT_DIR``. An
ASan build needs its library preloaded. Each launch draws a schedule of its own from a running seed; an error names the
seed, and ``SHIVA_SIMT_SEED`` starts there.
"""

import importlib
import json
import os
import re
import sys
from pathlib import Path

import torch

import shiva_ext.ops  # noqa: F401  (defines the CPU kernels, which are overridden here)

VARIANT = os.environ.get("SHIVA_SIMT", "")
_libraries = []


def install() -> None:
    """Override the CPU kernel of every op of torch.ops.shiva that has a simulated CUDA kernel."""
    folder = os.environ.get("SHIVA_SIMT_DIR") or Path(__file__).parents[2] / "build" / "simt"
    sys.path.insert(0, str(folder))
    module = importlib.import_module(f"_simt_{VARIANT}")
    assert module.variant == VARIANT
    module.set_seed(int(os.environ.get("SHIVA_SIMT_SEED", "1")))
    library = torch.library.Library("shiva", "IMPL")
    for schema in torch._C._jit_get_all_schemas():
        name = schema.name.removeprefix("shiva_simt::")
        if name == schema.name:
            continue
        if torch._C._dispatch_has_kernel_for_dispatch_key(schema.name, "CPU"):
            op = getattr(torch.ops.shiva_simt, name).default
            library.impl(name, op, "CPU", allow_override=True)
    _libraries.append(library)


if VARIANT:
    install()


def report() -> str:
    """How much was simulated, so that nobody takes a run of the CPU kernels for one of these."""
    module = sys.modules[f"_simt_{VARIANT}"]
    counts: dict[str, int] = {}
    for text, count in module.launches_by_kernel().items():
        name = re.search(r"\w+_kernel", text)[0]
        counts[name] = counts.get(name, 0) + count
    return (
        f"simulated CUDA ({VARIANT}): {module.launches_run()} launches, {module.threads_run()} threads\n"
        f"launches, each in a schedule of its own: {json.dumps(counts)}"
    )
