"""A PATH on which nvcc is not found, and nothing else is missing."""

import os
from pathlib import Path


def environment_without_nvcc(folder: Path) -> dict[str, str]:
    """This process's environment without nvcc, and without what leads CMake to a CUDA toolkit elsewhere.

    Args:
        folder: for links to the other programs of the PATH's folders that hold nvcc.
    """
    path = os.environ["PATH"].split(os.pathsep)
    for number, entry in enumerate(path):
        if (Path(entry) / "nvcc").exists():
            links = folder / f"path{number}"
            links.mkdir()
            for program in Path(entry).iterdir():
                if program.name != "nvcc":
                    (links / program.name).symlink_to(program)
            path[number] = str(links)
    leading = ("CUDA", "NVCC", "SHIVA", "TORCH_CUDA")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(leading)}
    return kept | {"PATH": os.pathsep.join(path)}
