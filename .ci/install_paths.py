"""Four ways to install the package without nvcc, each in a virtual environment of its own, each tried afterwards.

* source archive, build isolation, torch not there before
* source archive, --no-build-isolation, torch there before
* wheel
* checkout, editable, build isolation, torch not there before

`make build` is a fifth: checkout, editable, --no-build-isolation.

    python .ci/install_paths.py [--torch torch==2.13.0] [--keep-wheel FOLDER]
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "python_tests"))
from without_nvcc import environment_without_nvcc  # noqa: E402

TRY = """
import torch, shiva_ext
scores = torch.tensor([[1.0, 3.0, 2.0]])
kept, rejected = torch.ops.shiva.topk_select(scores, 2)
assert kept.tolist() == [[1, 2]] and rejected.tolist() == [[0]]
assert shiva_ext.build_info()["cuda"] is None
print(f"torch {torch.__version__}, {shiva_ext.__file__}")
"""
BUILD_TOOLS = ("scikit-build-core>=0.10", "pybind11>=2.13", "cmake", "ninja", "numpy")


environment: dict[str, str] = {}


def run(*command: object, cwd: Path = ROOT) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"install_paths: {' '.join(map(str, command))} failed:\n{(done.stdout + done.stderr)[-5000:]}")
    return done.stdout


class Environment:
    """A fresh virtual environment."""

    def __init__(self, folder: Path):
        venv.create(folder, with_pip=True)
        self.folder, self.python = folder, folder / "bin" / "python"

    def install(self, *what: object) -> None:
        run(self.python, "-m", "pip", "install", "--quiet", *what)

    def attempt(self) -> str:
        return run(self.python, "-c", TRY, cwd=self.folder).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", default="torch==2.13.0")
    parser.add_argument("--keep-wheel", type=Path, help="folder for the wheel built on the way")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        environment.update(environment_without_nvcc(work))
        tools = Environment(work / "tools")
        tools.install(args.torch, *BUILD_TOOLS, "build")
        dist = work / "dist"
        run(tools.python, "-m", "build", "--sdist", "--no-isolation", "--outdir", dist)
        (archive,) = dist.glob("*.tar.gz")
        print(f"{archive.name}: {archive.stat().st_size / 2**20:.1f} MiB", flush=True)

        isolated = Environment(work / "isolated")
        isolated.install(archive, args.torch)
        print("source archive, build isolation:", isolated.attempt(), flush=True)
        shutil.rmtree(isolated.folder)

        tools.install("--no-build-isolation", "--no-deps", archive)
        print("source archive, no build isolation:", tools.attempt(), flush=True)
        run(tools.python, "-m", "pip", "uninstall", "--quiet", "--yes", "shiva_ext")

        run(tools.python, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", dist, archive)
        (wheel,) = dist.glob("*.whl")
        if args.keep_wheel:
            args.keep_wheel.mkdir(parents=True, exist_ok=True)
            shutil.copy(wheel, args.keep_wheel)
        tools.install("--no-deps", wheel)
        print("wheel:", tools.attempt(), flush=True)
        run(tools.python, "-m", "pip", "uninstall", "--quiet", "--yes", "shiva_ext")

        checkout = work / "checkout"  # a copy: an editable install leaves its build folder there
        shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.so"))
        editable = Environment(work / "editable")
        editable.install("--editable", checkout, args.torch)
        print("checkout, editable, build isolation:", editable.attempt(), flush=True)


if __name__ == "__main__":
    main()
