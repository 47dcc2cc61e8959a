"""A copy of the package that does not fit says so in one sentence, with the command that mends it."""

import subprocess
import sys
from pathlib import Path

import pytest

import shiva_ext
from shiva_ext._fit import cuda_complaint, python_complaint, torch_complaint

PACKAGE = Path(shiva_ext.__file__).parent


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "2.14.1", "2.15.0a0+git1234", "3.0.0"])
def test_a_new_enough_torch_is_welcome(version):
    assert torch_complaint(version) is None


@pytest.mark.parametrize("version", ["2.9.1", "2.9.0+cu128", "1.13.1"])
def test_an_old_torch_is_named_with_the_command_that_mends_it(version):
    complaint = torch_complaint(version)
    assert f"this is torch {version}" in complaint and "pip install 'torch>=2.10'" in complaint


@pytest.mark.parametrize("built, torch", [(None, None), (None, "12.8"), ("13.0.88", None), ("13.0.88", "13.2")])
def test_libraries_that_fit_their_torch(built, torch):
    assert cuda_complaint(built, torch, "0.1.0") is None


@pytest.mark.parametrize("built, torch, wheel", [("13.0.88", "12.8", "+cu12"), ("12.6.20", "13.0", "+cu13")])
def test_another_cuda_major_names_the_right_wheels_and_how_to_do_without(built, torch, wheel):
    complaint = cuda_complaint(built, torch, "0.1.0+cu999")
    assert f"CUDA {built}" in complaint and f"CUDA {torch}" in complaint and f"{wheel} in its name" in complaint
    assert "pip install --force-reinstall --no-deps --no-binary shiva_ext 'shiva_ext==0.1.0'" in complaint


def test_a_library_for_another_python(tmp_path):
    (tmp_path / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    complaint = python_complaint(tmp_path, [".cpython-311-x86_64-linux-gnu.so", ".so"], "0.1.0")
    assert "_C.cpython-39-x86_64-linux-gnu.so" in complaint and "shiva_ext==0.1.0" in complaint
    assert python_complaint(tmp_path, [".cpython-39-x86_64-linux-gnu.so"], "0.1.0") is None


def test_a_checkout_that_was_not_built(tmp_path):
    assert "pip install --no-build-isolation -e ." in python_complaint(tmp_path, [".so"], "0.1.0")


def import_with(tmp_path: Path, torch_version: str, torch_cuda: str | None, library: str) -> str:
    """The last line that importing the package prints, with a torch that only claims to be one."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        f"__version__ = {torch_version!r}\nclass version:\n    cuda = {torch_cuda!r}\n"
    )
    package = tmp_path / "shiva_ext"
    package.mkdir()
    for name in ("__init__.py", "_library.py", "_fit.py"):
        (package / name).write_text((PACKAGE / name).read_text())
    for name in ("_registrations.py", "ops.py", "reference.py"):  # what they import, an old torch may not have
        (package / name).write_text("import sys; assert hasattr(sys.modules['shiva_ext'], 'build_info')\n")
    if library:
        (package / "_C.py").write_text(library)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import shiva_ext"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    return done.stderr.strip().splitlines()[-1] if done.returncode else "imported"


CUDA_13 = "def build_info(): return {'cuda': '13.0.88'}"


@pytest.mark.parametrize(
    "torch_version, torch_cuda, library, said",
    [
        ("2.13.0+cpu", None, CUDA_13, "imported"),
        ("2.14.1", "13.0", CUDA_13, "imported"),
        ("2.9.1", None, CUDA_13, "ImportError: shiva_ext needs torch >= 2.10, but this is torch 2.9.1"),
        (
            "2.12.0",
            "12.8",
            CUDA_13,
            "ImportError: shiva_ext was built with CUDA 13.0.88, but this torch uses CUDA 12.8",
        ),
        ("2.13.0", None, "", "has no compiled library"),
        ("2.13.0", None, "raise ImportError('undefined symbol: x')", "has no compiled library"),
    ],
)
def test_at_import_it_is_said_in_one_line(tmp_path, torch_version, torch_cuda, library, said):
    assert said in import_with(tmp_path, torch_version, torch_cuda, library)
