"""Checks the machine code inside a built library or wheel, without a GPU. (Warnings are errors in the build itself.)

* Machine code for every architecture, and PTX for the last one only.
* No stack, no spill, no local memory in any kernel.
* Registers and static shared memory of each kernel stay within cuda_budget.json beside this file
  (`--update` writes what is there now; the difference belongs into the commit).
* PROMISES: kernels that must move 128 bits at a time, or use the tensor cores, do.

    python .ci/cuda_gates.py dist/shiva_ext-0.1.0+cu130-*.whl [--update] [--architectures 75 80 86 89 90 100 120]
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

BUDGET = Path(__file__).with_name("cuda_budget.json")
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
# Kernels in their form for 16-byte accesses, by pattern of their name.
COPIES = r"(token_gather|token_scatter|residual_gate|expert_dispatch)(_in_place|_backward)?_kernel<uint4"
PACKS = r"(residual_gate|counterfactual_scatter|token_gather_table|expert_combine)(_backward)?_kernel<Pack<\w+, [248]>"
MODULATE = r"(gather_modulate|scatter_residual|scatter_mean)(_backward)?(_wide)?_kernel<\w+, [248]\b"
# (pattern of the kernel's name, oldest architecture, instruction that must appear)
PROMISES = [
    *((pattern, 75, opcode) for pattern in (COPIES, PACKS, MODULATE) for opcode in ("LDG.E.128", "STG.E.128")),
    (r"zero_absent_rows_kernel<uint4", 75, "STG.E.128"),
    (r"router_\w+_kernel<MmaProduct<f16", 75, "HMMA"),
    (r"router_\w+_kernel<MmaProduct<bf16", 80, "HMMA"),
]


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


def cuobjdump(library: Path, *options: str) -> str:
    command = [tool("cuobjdump"), *options, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def demangle(names: list[str]) -> dict[str, str]:
    """Symbol to `topk_select_row_kernel<float, 1024, 4>`: without namespaces, return type and parameters."""
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = {}
    for symbol, text in zip(names, plain.splitlines(), strict=True):
        text = text.replace("shiva::cuda::", "").removeprefix("void ")
        depth = 0
        for end, letter in enumerate(text):
            depth += {"<": 1, ">": -1}.get(letter, 0)
            if letter == "(" and depth == 0 and not text.startswith("(anonymous", end):
                text = text[:end]
                break
        short[symbol] = text
    return short


def by_architecture(text: str):
    """(architecture, lines) of each part of cuobjdump's answer."""
    parts = re.split(r"^arch = sm_(\d+)[af]?$", text, flags=re.MULTILINE)
    for architecture, part in zip(parts[1::2], parts[2::2], strict=True):
        yield int(architecture), part.splitlines()


def resources(library: Path) -> dict[tuple[str, int], dict[str, int]]:
    """(symbol, architecture) -> REG, STACK, SHARED, LOCAL"""
    found, symbol = {}, ""
    for architecture, lines in by_architecture(cuobjdump(library, "-res-usage")):
        for line in lines:
            if match := re.match(r"\s*Function (\w+):", line):
                symbol = match[1]
            elif match := re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line):
                found[symbol, architecture] = {key: int(value) for key, value in match}
    return found


def instructions(library: Path) -> dict[tuple[str, int], set[str]]:
    """(symbol, architecture) -> its opcodes, such as LDG.E.128"""
    found, symbol = {}, ""
    for architecture, lines in by_architecture(cuobjdump(library, "-sass")):
        for line in lines:
            if match := re.search(r"Function : (\w+)", line):
                symbol = match[1]
                found[symbol, architecture] = set()
            elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", line):
                found[symbol, architecture].add(match[1])
    return found


def check_code(library: Path, wanted: tuple[int, ...]) -> tuple[dict[str, dict[str, list[int]]], list[str]]:
    """-> {kernel: {architecture: [registers, bytes of static shared memory]}}, complaints"""
    used, opcodes = resources(library), instructions(library)
    names = demangle(sorted({symbol for symbol, _ in used}))
    measured, complaints = {}, []
    present = {architecture for _, architecture in used}
    if present != set(wanted):
        complaints.append(f"machine code for sm_{sorted(present)}, wanted sm_{sorted(wanted)}")
    ptx = {int(number) for number in re.findall(r"\.sm_(\d+)[af]?\.ptx", cuobjdump(library, "-lptx"))}
    if ptx != {max(wanted)}:
        complaints.append(f"PTX for {sorted(ptx) or 'nothing'}, wanted it for sm_{max(wanted)} only")
    for (symbol, architecture), use in sorted(used.items()):
        name = names[symbol]
        measured.setdefault(name, {})[str(architecture)] = [use["REG"], use["SHARED"]]
        code = opcodes.get((symbol, architecture), set())
        if not code:
            complaints.append(f"{name}, sm_{architecture}: its machine code was not found")
        local = sorted(opcode for opcode in code if re.match(r"(LDL|STL)\b", opcode))
        if use["STACK"] or use["LOCAL"] or local:
            complaints.append(f"{name}, sm_{architecture}: {use['STACK']} bytes of stack, {local}; wanted none")
        for pattern, oldest, opcode in PROMISES:
            if architecture >= oldest and re.match(pattern, name) and not any(o.startswith(opcode) for o in code):
                complaints.append(f"{name}, sm_{architecture}: no {opcode}")
    for pattern, _, _ in PROMISES:
        if not any(re.match(pattern, name) for name in measured):
            complaints.append(f"no kernel's name matches {pattern}")
    return measured, complaints


def over_budget(measured: dict[str, dict[str, list[int]]]) -> list[str]:
    """What uses more registers or shared memory than it did."""
    budget = json.loads(BUDGET.read_text())
    complaints = [f"{name}: in {BUDGET.name}, but not in the library" for name in budget if name not in measured]
    for name, by_arch in measured.items():
        for architecture, (registers, shared) in by_arch.items():
            allowed = budget.get(name, {}).get(architecture)
            if allowed is None:
                complaints.append(f"{name}, sm_{architecture}: not in {BUDGET.name}; run with --update")
            elif registers > allowed[0] or shared > allowed[1]:
                complaints.append(
                    f"{name}, sm_{architecture}: {registers} registers and {shared} bytes of shared memory, "
                    f"over the budget of {allowed[0]} and {allowed[1]}"
                )
    return complaints


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", type=Path, help="a library, or a wheel that holds one")
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES)
    args = parser.parse_args()
    os.environ["PATH"] = f"{Path(tool('nvdisasm')).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as folder:
        library = args.library
        if library.suffix == ".whl":
            with zipfile.ZipFile(library) as wheel:
                (name,) = [n for n in wheel.namelist() if re.search(r"shiva_ext/_C.*\.so$", n)]
                library = Path(wheel.extract(name, folder))
        measured, complaints = check_code(library, tuple(args.architectures))
    if args.update:
        text = ",\n".join(f" {json.dumps(name)}: {json.dumps(measured[name])}" for name in sorted(measured))
        temporary = BUDGET.with_suffix(".tmp")
        temporary.write_text("{\n" + text + "\n}\n")
        os.replace(temporary, BUDGET)
    complaints += over_budget(measured)
    print(*complaints, sep="\n")
    print(
        f"cuda_gates: {len(measured)} kernels for sm_{', sm_'.join(map(str, args.architectures))}: "
        f"{len(complaints)} complaints"
    )
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
