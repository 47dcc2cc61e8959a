"""Compiles every csrc/cuda/*.cu for every architecture and checks the machine code. Needs nvcc, not a GPU.

* No warning; no spill, no stack, no local memory.
* Registers and static shared memory of each kernel stay within cuda_budget.json beside this file
  (`--update` writes what is there now; the difference belongs into the commit).
* PROMISES: kernels that must move 128 bits at a time, or use the tensor cores, do.

    python .ci/cuda_gates.py [--update] [--architectures 75 80 86 89 90 100 120] [--jobs 2] [--only topk_select]
"""

import argparse
import concurrent.futures
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUDGET = Path(__file__).with_name("cuda_budget.json")
OUT = ROOT / "build" / "cuda_gates"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
# (kernel's name, oldest architecture, instruction that must appear)
PROMISES: list[tuple[str, int, str]] = []


def tool(name: str) -> str:
    """nvcc's own cuobjdump or nvdisasm, or the one from PyPI."""
    if found := shutil.which(name):
        return found
    for folder in sys.path:
        binary = Path(folder) / "nvidia" / "cu13" / "bin" / name
        if binary.is_file():
            binary.chmod(0o755)
            return str(binary)
    sys.exit(f"cuda_gates: {name} was not found; pip install nvidia-cuda-{name}")


def demangle(names: list[str]) -> dict[str, str]:
    """Symbol to `topk_select_row_kernel<float, 1024, 4>`: without namespaces, return type and parameters."""
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = {}
    for symbol, text in zip(names, plain.splitlines(), strict=True):
        text = text.replace("shiva::cuda::", "").removeprefix("void ")
        depth = 0
        for end, letter in enumerate(text):
            depth += {"<": 1, ">": -1}.get(letter, 0)
            if letter == "(" and depth == 0:
                text = text[:end]
                break
        short[symbol] = text
    return short


def compile_file(source: Path, architecture: int) -> tuple[Path, str]:
    """-> (cubin, what nvcc said)"""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    cubin = OUT / f"{source.stem}.sm_{architecture}.cubin"
    command = ["nvcc", "-std=c++20", "-O3", "-cubin", "-arch", f"sm_{architecture}", "-Xptxas", "-v"]
    command += ["-Werror", "all-warnings", f"-I{ROOT / 'csrc'}", "-isystem", str(torch / "include")]
    command += ["-DTORCH_TARGET_VERSION=((2ULL << 56) | (10ULL << 48))", "-o", str(cubin), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"cuda_gates: {source.name} does not compile for sm_{architecture}:\n{done.stdout}{done.stderr}")
    return cubin, done.stderr


def resources(report: str) -> dict[str, dict[str, int]]:
    """ptxas's report: symbol -> registers, shared, stack, spill (bytes)"""
    kernels, symbol = {}, None
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            symbol = match[1]
            kernels[symbol] = {"registers": 0, "shared": 0, "stack": 0, "spill": 0}
        elif symbol and (match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", line)):
            kernels[symbol] |= {"stack": int(match[1]), "spill": int(match[2]) + int(match[3])}
        elif symbol and (match := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            kernels[symbol] |= {"registers": int(match[1]), "shared": int(shared[1]) if shared else 0}
    return kernels


def instructions(cubin: Path) -> dict[str, set[str]]:
    """symbol -> its opcodes, such as LDG.E.128"""
    text = subprocess.run([tool("cuobjdump"), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    kernels, symbol = {}, None
    for line in text.splitlines():
        if match := re.search(r"Function : (\w+)", line):
            symbol = match[1]
            kernels[symbol] = set()
        elif symbol and (match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", line)):
            kernels[symbol].add(match[1])
    return kernels


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    if shutil.which("nvcc") is None:
        print("cuda_gates: nvcc was not found; nothing is checked")
        return 0
    os.environ["PATH"] = f"{Path(tool('nvdisasm')).parent}{os.pathsep}{os.environ['PATH']}"
    OUT.mkdir(parents=True, exist_ok=True)

    jobs = [
        (s, a) for s in sorted((ROOT / "csrc/cuda").glob("*.cu")) for a in args.architectures if args.only in s.stem
    ]
    measured, complaints, opcodes = {}, [], {}
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for (_, architecture), (cubin, report) in zip(jobs, pool.map(lambda j: compile_file(*j), jobs), strict=True):
            kernels, code = resources(report), instructions(cubin)
            names = demangle(list(kernels))
            for symbol, used in kernels.items():
                name = names[symbol]
                measured.setdefault(name, {})[str(architecture)] = [used["registers"], used["shared"]]
                opcodes[name, architecture] = code.get(symbol, set())
                local = sorted(op for op in code.get(symbol, ()) if re.match(r"(LDL|STL)\b", op))
                if used["stack"] or used["spill"] or local:
                    complaints.append(
                        f"{name}, sm_{architecture}: {used['stack']} bytes of stack, {used['spill']} of "
                        f"spills, {local or 'no'} local memory; wanted none"
                    )
    for wanted, oldest, opcode in PROMISES:
        for (name, architecture), found in opcodes.items():
            if name.startswith(wanted) and architecture >= oldest and not any(o.startswith(opcode) for o in found):
                complaints.append(f"{name}, sm_{architecture}: no {opcode}")
        if not args.only and not any(name.startswith(wanted) for name, _ in opcodes):
            complaints.append(f"no kernel is called {wanted}...")

    if args.update:
        text = ",\n".join(f" {json.dumps(name)}: {json.dumps(measured[name])}" for name in sorted(measured))
        temporary = BUDGET.with_suffix(".tmp")
        temporary.write_text("{\n" + text + "\n}\n")
        os.replace(temporary, BUDGET)
    budget = json.loads(BUDGET.read_text())
    for name, by_architecture in measured.items():
        for architecture, (registers, shared) in by_architecture.items():
            allowed = budget.get(name, {}).get(architecture)
            if allowed is None:
                complaints.append(f"{name}, sm_{architecture}: not in {BUDGET.name}; run with --update")
            elif registers > allowed[0] or shared > allowed[1]:
                complaints.append(
                    f"{name}, sm_{architecture}: {registers} registers and {shared} bytes of shared "
                    f"memory, over the budget of {allowed[0]} and {allowed[1]}"
                )
    for complaint in complaints:
        print(complaint)
    print(
        f"cuda_gates: {len(measured)} kernels for sm_{', sm_'.join(map(str, args.architectures))}: "
        f"{len(complaints)} complaints"
    )
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
