"""The compiled library itself: the symbols it needs, what it says of its build, and each of its CPU code paths."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shiva_ext
from shiva_ext import _C

LIBRARY = Path(_C.__file__)
LEVELS = ["default", "avx2", "avx512"]


def hardware_level() -> str:
    """The highest of our code paths that this processor can run, as torch sees it."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return capability if capability in LEVELS else "default"


def run(code_path: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"SHIVA_CPU_CAPABILITY": code_path}
    tests = Path(__file__).parent.parent
    roots = [str(tests), str(Path(shiva_ext.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, roots))
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
def test_the_library_needs_no_cxx_symbol_of_torch():
    """Then one build serves every torch from the target version on. The C functions aoti_torch_* and torch_* stay."""
    command = ["nm", "-D", "--undefined-only", "-C", str(LIBRARY)]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert symbols
    assert [line for line in symbols if re.search(r"\b(at|c10|torch)::", line)] == []


def test_build_info_says_how_the_library_was_built():
    info = shiva_ext.build_info()
    assert info["version"] == shiva_ext.__version__
    for entry in ("torch_build_version", "torch_target_version", "compiler"):
        assert isinstance(info[entry], str), entry
        assert info[entry], entry
    assert info["cuda"] is None or re.fullmatch(r"\d+\.\d+.*", info["cuda"])
    assert info["cpu_capability"] in info["cpu_capabilities_built"]
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2", "AVX512"):
        assert info["cpu_capabilities_built"] == LEVELS


@pytest.mark.parametrize("level", LEVELS)
def test_each_code_path_equals_the_reference(level):
    if level not in shiva_ext.build_info()["cpu_capabilities_built"]:
        pytest.skip(f"this build has no {level} code")
    if LEVELS.index(level) > LEVELS.index(hardware_level()):
        pytest.skip(f"this processor cannot run {level} code")
    result = run(level, "-m", "ops.matrix")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {"cpu_capability": level, "complaints": []}


@pytest.mark.skipif("SHIVA_CPU_CAPABILITY" in os.environ, reason="SHIVA_CPU_CAPABILITY asks for another code path")
def test_the_highest_code_path_of_the_processor_is_the_default():
    assert shiva_ext.build_info()["cpu_capability"] == hardware_level()


def test_an_unknown_code_path_is_refused_by_name():
    result = run("sse9", "-c", "import torch; from shiva_ext import ops; ops.topk_select(torch.ones(1, 2), 1)")
    assert result.returncode != 0
    assert re.search(r"SHIVA_CPU_CAPABILITY.*sse9", result.stderr)
