"""Whether this copy of the package fits the Python and torch it was imported with; if not, one sentence that says so.

Nothing here needs the compiled library, which may not even load where it does not fit.
"""

import re
import sys
from pathlib import Path

OLDEST_TORCH = (2, 10)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.match(r"\d+(?:\.\d+)*", version)[0].split("."))


def torch_complaint(torch_version: str) -> str | None:
    """Why this torch is too old, or None."""
    if _release(torch_version)[:2] >= OLDEST_TORCH:
        return None
    oldest = ".".join(map(str, OLDEST_TORCH))
    return f"shiva_ext needs torch >= {oldest}, but this is torch {torch_version}: pip install 'torch>={oldest}'"


def python_complaint(folder: Path, suffixes: list[str], version: str) -> str | None:
    """Why the package has no library for this Python, or None if it has one.

    Args:
        folder: of the package.
        suffixes: file name endings of compiled modules that this Python loads.
        version: of the package.
    """
    if any((folder / f"_C{suffix}").is_file() for suffix in suffixes):
        return None
    here = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    built = sorted(path.name for path in folder.glob("_C.*.so"))
    if not built:
        return (
            f"shiva_ext in {folder} has no compiled library: run 'pip install --no-build-isolation -e .' in the "
            "checkout, or leave its folder if you installed a wheel"
        )
    return (
        f"shiva_ext was built for another Python ({built[0]}) than this one ({here}): "
        f"pip install --force-reinstall --no-deps shiva_ext=={version}"
    )


def cuda_complaint(built_with: str | None, torch_cuda: str | None, version: str) -> str | None:
    """Why the library's CUDA does not fit torch's, or None. Without CUDA on either side there is nothing to fit.

    Args:
        built_with: CUDA version of the library, such as "13.0.88".
        torch_cuda: ``torch.version.cuda``.
        version: of the package.
    """
    if built_with is None or torch_cuda is None or _release(built_with)[0] == _release(torch_cuda)[0]:
        return None
    # Any minor version will do, and which one a wheel was built with is not known here.
    return (
        f"shiva_ext was built with CUDA {built_with}, but this torch uses CUDA {torch_cuda}: install a wheel with "
        f"+cu{_release(torch_cuda)[0]} in its name, or compile one with that CUDA's nvcc: "
        f"pip install --force-reinstall --no-deps --no-binary shiva_ext 'shiva_ext=={version.split('+')[0]}'"
    )
