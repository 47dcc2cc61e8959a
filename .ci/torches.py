"""One wheel, many torches: installs the same wheel file beside each torch and runs the tests of the ops there.

For every torch, in a virtual environment of its own in build/torches: the package imports from the wheel; a wheel with
CUDA shows a CUDA kernel for every op; without a GPU a CUDA tensor gives torch's own error, not a crash; the tests of
the whole package pass. Needs no GPU.

    python .ci/torches.py dist/shiva_ext-0.1.0+cpu-*.whl 2.13.0 2.14.1 [--keep]
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = ROOT / "build" / "torches"
APART = ("simt", "cpp", "cuda")  # of the checkout and its build, not of the wheel
PROBE = """
import torch, shiva_ext
from shiva_ext import build_info
info = build_info()
print(f"torch {torch.__version__}, its CUDA {torch.version.cuda}, the wheel's CUDA {info['cuda']}")
ops = [s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("shiva::")]
assert len(set(ops)) == 28, ops
for op in ops:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(op, "CPU"), f"{op} has no CPU kernel"
    if info["cuda"]:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA"), f"{op} has no CUDA kernel"
if not torch.cuda.is_available():
    try:
        torch.ops.shiva.topk_select(torch.zeros(1, 4, device="cuda"), 2)
    except (RuntimeError, AssertionError) as error:
        print("without a GPU:", str(error).splitlines()[0])
        wanted = "NVIDIA driver" if torch.version.cuda else "not compiled with CUDA"
        assert wanted in str(error), f"wanted torch's own error about '{wanted}'"
    else:
        raise SystemExit("a CUDA tensor without a GPU")
print(f"{len(set(ops))} ops from {shiva_ext.__file__}")
"""


def run(*command: object, **kwargs) -> str:
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs)
    text = done.stdout.decode(errors="replace")
    if done.returncode:
        sys.exit(f"torches: {' '.join(map(str, command))} failed:\n{text[-6000:]}")
    return text


def check(wheel: Path, version: str, keep: bool) -> str:
    """Install and test one combination; returns the test runner's summary."""
    folder = OUT / version
    python, pip = folder / "bin" / "python", (folder / "bin" / "python", "-m", "pip", "install", "--quiet")
    print(f"== {wheel.name} with torch {version} ==", flush=True)
    if not python.is_file():
        venv.create(folder, with_pip=True, clear=True)
        run(*pip, f"torch=={version}")
    # Of the wheel itself a fresh copy, of what it needs whatever is there.
    run(*pip, f"{wheel}[test]", f"torch=={version}")
    run(*pip, "--force-reinstall", "--no-deps", wheel)
    tests = folder / "tests"  # apart from the checkout, whose own package must not be imported
    shutil.rmtree(tests, ignore_errors=True)
    shutil.copytree(ROOT / "python_tests", tests / "python_tests", ignore=shutil.ignore_patterns("__pycache__", *APART))
    # Else pytest would take the checkout's settings, and with them its tests.
    settings = ["pythonpath = python_tests", "timeout = 1200", "filterwarnings ="]
    settings += ["    ignore::DeprecationWarning", "    ignore::FutureWarning"]
    (tests / "pytest.ini").write_text("\n".join(["[pytest]", *settings, ""]))
    print(run(python, "-c", PROBE, cwd=tests), end="", flush=True)
    text = run(folder / "bin" / "pytest", "-q", "-p", "no:cacheprovider", "python_tests", cwd=tests)
    if not keep:
        shutil.rmtree(folder)
    return re.findall(r"^.*\d+ passed.*$", text, flags=re.MULTILINE)[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("versions", nargs="+")
    parser.add_argument("--keep", action="store_true", help="keep the environments, several GB each, for the next run")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "2")
    summaries = {version: check(args.wheel.resolve(), version, args.keep) for version in args.versions}
    for version, summary in summaries.items():
        print(f"{args.wheel.name}, torch {version}: {summary}")


if __name__ == "__main__":
    main()
