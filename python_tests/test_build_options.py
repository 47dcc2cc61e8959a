"""What CMake makes of SHIVA_WITH_CUDA, with nvcc on the PATH and without. Configures only; compiles nothing of ours."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from without_nvcc import environment_without_nvcc

ROOT = Path(__file__).parents[1]
PROGRAMS = Path(sys.executable).parent
NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(
    not (ROOT / "CMakeLists.txt").is_file() or not (PROGRAMS / "ninja").is_file(),
    reason="needs the checkout, and cmake and ninja beside this Python",
)


def configure(tmp_path: Path, setting: str, with_nvcc: bool) -> tuple[bool, str]:
    """-> (whether it succeeded, what it said)"""
    environment = None if with_nvcc else environment_without_nvcc(tmp_path)
    pybind = subprocess.run([sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True)
    options = {
        "CMAKE_MAKE_PROGRAM": PROGRAMS / "ninja",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind.stdout.strip(),
        "SHIVA_WITH_CUDA": setting,
        "CMAKE_CUDA_ARCHITECTURES": "80-real",
    }
    command = [str(PROGRAMS / "cmake"), "-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja"]
    command += [f"-D{name}={value}" for name, value in options.items()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.returncode == 0, " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize(
    "setting, succeeds, said",
    [
        ("AUTO", True, "CUDA kernels off (nvcc not found)"),
        ("OFF", True, "CUDA kernels off (SHIVA_WITH_CUDA=OFF)"),
        ("ON", False, "SHIVA_WITH_CUDA=ON, but nvcc was not found; install the CUDA toolkit or put nvcc on the PATH"),
        ("MAYBE", False, "SHIVA_WITH_CUDA must be AUTO, ON or OFF, got 'MAYBE'"),
    ],
)
def test_without_nvcc(tmp_path, setting, succeeds, said):
    found = configure(tmp_path, setting, with_nvcc=False)
    assert found[0] is succeeds and said in found[1], found[1][-1500:]


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("setting, said", [("AUTO", "CUDA kernels on (nvcc "), ("OFF", "CUDA kernels off (SHIVA_WITH")])
def test_with_nvcc(tmp_path, setting, said):
    succeeded, text = configure(tmp_path, setting, with_nvcc=True)
    assert succeeded and said in text, text[-1500:]
