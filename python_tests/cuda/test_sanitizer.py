"""The ops under compute-sanitizer: accesses out of bounds, races in shared memory, misuse of barriers."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def compute_sanitizer() -> str | None:
    """On the PATH, in a CUDA toolkit, or of the wheel nvidia-cuda-sanitizer-api."""
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    folders += [Path(each) / "nvidia" / "cu13" / "bin" for each in sys.path]
    return shutil.which("compute-sanitizer") or next(
        (str(folder / "compute-sanitizer") for folder in folders if (folder / "compute-sanitizer").is_file()), None
    )


def sanitize(tool: str, script: Path) -> subprocess.CompletedProcess:
    program = compute_sanitizer()
    if program is None:
        missing = "no compute-sanitizer: it is part of the CUDA toolkit, and of `pip install nvidia-cuda-sanitizer-api`"
        (pytest.fail if os.environ.get("SHIVA_REQUIRE_CUDA") == "1" else pytest.skip)(missing)
    # Our kernels alone (their namespace in mangled names); calls that torch makes in vain are no concern of theirs.
    options = ["--tool", tool, "--kernel-name", "kns=5shiva4cuda", "--report-api-errors", "no", "--launch-timeout", "0"]
    # Each tensor in an allocation of its own: within torch's pools an access out of bounds would stay unnoticed.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
    command = [program, *options, sys.executable, str(script)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool):
    done = sanitize(tool, HERE / "short_ops.py")
    # Its exit status is 0 also where the program died: the summary and the program's own last words count.
    summary = re.search(r"SUMMARY: (\d+) (errors?|hazards?)", done.stdout)
    calls = re.search(r"^(\d+) calls$", done.stdout, re.MULTILINE)
    assert summary and summary[1] == "0" and calls and int(calls[1]) > 100, (
        f"{done.stdout[-6000:]}{done.stderr[-2000:]}"
    )
