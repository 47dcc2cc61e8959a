"""Builds the wheels into dist/: `make wheels`. One per CUDA version of the nvcc at hand, and one without CUDA.

Each is built with the installed torch's headers, labelled (+cpu, +cu130), given its manylinux tag by auditwheel, and
checked: one native library, found beside torch's at run time, and no copy of torch or CUDA inside.

    python .ci/wheels.py [cpu] [cuda]
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
RAW, DIST = ROOT / "build" / "wheels", ROOT / "dist"
EXCLUDED = ["libtorch*.so*", "libc10*.so*", "libcuda*.so*", "libcudart*.so*"]


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"wheels: {' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def cuda_label() -> str:
    """ "cu130" for the nvcc on the PATH."""
    if shutil.which("nvcc") is None:
        sys.exit("wheels: the CUDA wheel needs nvcc on the PATH; build only the other one with `.ci/wheels.py cpu`")
    major, minor = re.search(r"release (\d+)\.(\d+)", run("nvcc", "--version")).groups()
    return f"cu{major}{minor}"


def relabel(wheel: Path, label: str, folder: Path) -> Path:
    """The same wheel as version X+label: `pip` installs a label only where it is asked for, or the index offers it."""
    run(sys.executable, "-m", "wheel", "unpack", wheel, "--dest", folder)
    (unpacked,) = [path for path in folder.iterdir() if path.is_dir()]
    (info,) = unpacked.glob("*.dist-info")
    version = info.name.removesuffix(".dist-info").split("-")[1]
    metadata = (info / "METADATA").read_text()
    (info / "METADATA").write_text(metadata.replace(f"\nVersion: {version}\n", f"\nVersion: {version}+{label}\n", 1))
    info.rename(unpacked / f"shiva_ext-{version}+{label}.dist-info")
    unpacked = unpacked.rename(folder / f"shiva_ext-{version}+{label}")
    run(sys.executable, "-m", "wheel", "pack", unpacked, "--dest-dir", folder)
    (labelled,) = folder.glob("*.whl")
    return labelled


def build(label: str) -> Path:
    """Build, label and repair one wheel; returns the file in dist/."""
    shutil.rmtree(RAW / label, ignore_errors=True)
    with_cuda = "OFF" if label == "cpu" else "ON"
    print(f"== {label}: compiling ==", flush=True)
    run(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", RAW / label),
        # A build folder of its own: the checkout's has other settings.
        *(f"--config-settings=cmake.define.SHIVA_WITH_CUDA={with_cuda}", f"--config-settings=build-dir=build/{label}"),
        ROOT,
    )
    (raw,) = (RAW / label).glob("*.whl")
    with tempfile.TemporaryDirectory(dir=RAW) as temporary:
        labelled = relabel(raw, label, Path(temporary))
        before = set(DIST.glob("*.whl"))
        for old in before:
            if f"+{label}-cp{sys.version_info.major}{sys.version_info.minor}-" in old.name:
                old.unlink()
        before = set(DIST.glob("*.whl"))
        excluded = [part for name in EXCLUDED for part in ("--exclude", name)]
        run(sys.executable, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", DIST, labelled)
        (finished,) = set(DIST.glob("*.whl")) - before
    check(finished)
    return finished


def check(wheel: Path) -> None:
    """Exit unless the wheel is what its name says."""
    names = zipfile.ZipFile(wheel).namelist()
    native = [name for name in names if re.search(r"\.so(\.|$)", name)]
    if len(native) != 1 or not native[0].startswith("shiva_ext/_C"):
        sys.exit(f"wheels: {wheel.name} holds {native}, wanted one native library")
    if "manylinux" not in wheel.name:
        sys.exit(f"wheels: {wheel.name} has no manylinux tag")
    with tempfile.TemporaryDirectory() as folder:
        library = zipfile.ZipFile(wheel).extract(native[0], folder)
        dynamic = run("readelf", "-d", library)
    if "$ORIGIN/../torch/lib" not in dynamic:
        sys.exit(f"wheels: {native[0]} does not look for torch's libraries beside itself:\n{dynamic}")
    needed = re.findall(r"NEEDED.*\[(.+)\]", dynamic)
    print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB, needs {', '.join(needed)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", nargs="*", choices=["cpu", "cuda", []], default=[])
    args = parser.parse_args()
    DIST.mkdir(exist_ok=True)
    for which in args.which or ["cpu", *(["cuda"] if shutil.which("nvcc") else [])]:
        build("cpu" if which == "cpu" else cuda_label())


if __name__ == "__main__":
    main()
