"""The tests of csrc/simt: its checks are C++ programs, compiled here in the simulator's three variants.

``race_test`` runs in the variant race, the others in plain and asan. Each line ``ok <name>`` or ``FAIL <name>: why`` of
a program is the result of one test here.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
PROGRAMS = ["simt_test", "memory_test", "scheduler_test"]
RUNTIME = ["runtime", "fibre", "race"]
# (flags of the kernels, flags of the simulator, programs); as in cmake/ShivaSimt.cmake
SANITIZE = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
VARIANTS = {
    "plain": ([], [], PROGRAMS),
    "asan": (SANITIZE, SANITIZE, PROGRAMS),
    "race": (["-fsanitize=thread", "-Wno-tsan"], ["-DSHIVA_SIMT_RACE"], ["race_test"]),
}
# What the sanitizers must say of the checks that end the process.
CRASHES = {
    "reading_beyond_a_shared_array": "heap-buffer-overflow",
    "writing_beyond_dynamic_shared_memory": "heap-buffer-overflow",
    "reading_beyond_global_memory": "heap-buffer-overflow",
    "a_cp_async_beyond_its_array": "heap-buffer-overflow",
    "a_misaligned_vector_load": "misaligned address",
    "a_stack_that_overflows": "stack-overflow",
}
# A run under a sanitizer's preloaded library must not hand it down.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"} | {"ASAN_OPTIONS": "detect_leaks=0"}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing; it compiles the simulator's tests")


def run(*command, cwd):
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def names(program: str, kind: str) -> list[str]:
    return re.findall(rf"^{kind}\((\w+)\)", (HERE / f"{program}.cpp").read_text(), re.MULTILINE)


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """build(variant) -> the folder with its programs, and what the compiler had against them."""
    built = {}

    def build(variant: str) -> tuple[Path, str]:
        if variant in built:
            return built[variant]
        folder = tmp_path_factory.mktemp(variant)
        kernel_flags, runtime_flags, programs = VARIANTS[variant]
        compiler = ["g++", "-std=c++20", "-O1", "-I", CSRC, "-DSHIVA_SIMT"]
        commands = [[*compiler, *runtime_flags, "-c", CSRC / "simt" / f"{name}.cpp"] for name in RUNTIME]
        commands += [[*compiler, *kernel_flags, "-c", HERE / f"{program}.cpp"] for program in programs]
        # The race detector's hooks stand in for the sanitizer's library.
        linker = ["g++", "-pthread", *([] if variant == "race" else kernel_flags)]
        for program in programs:
            commands.append([*linker, *(f"{name}.o" for name in [program, *RUNTIME]), "-o", program])
        errors = ""
        for command in commands:
            done = run(*command, cwd=folder)
            if done.returncode != 0:
                errors = done.stdout
                break
        built[variant] = folder, errors
        return built[variant]

    return build


@pytest.fixture(scope="session")
def outcome(build):
    """outcome(variant, program) -> what the program printed, run once."""
    outputs = {}

    def outcome(variant: str, program: str) -> str:
        if (variant, program) not in outputs:
            folder, errors = build(variant)
            outputs[variant, program] = errors or run(folder / program, cwd=folder).stdout
        return outputs[variant, program]

    return outcome


@pytest.mark.parametrize(
    "variant, program, name",
    [
        pytest.param(variant, program, name, id=f"{variant}-{name}")
        for variant, (_, _, programs) in VARIANTS.items()
        for program in programs
        for name in names(program, "TEST")
    ],
)
def test_check_passes(outcome, variant, program, name):
    output = outcome(variant, program)
    line = re.search(rf"^(ok|FAIL) {name}\b.*$", output, re.MULTILINE)
    assert line, f"{program} ended before {name}:\n{output[-4000:]}"
    assert line[0] == f"ok {name}"


def test_every_crash_has_its_message():
    assert set(CRASHES) == set(names("scheduler_test", "CRASH"))


@pytest.mark.parametrize("name", CRASHES)
def test_sanitizers_stop(build, name):
    folder, errors = build("asan")
    assert not errors, errors
    done = run(folder / "scheduler_test", name, cwd=folder)
    assert done.returncode != 0 and CRASHES[name] in done.stdout, done.stdout[-4000:]
