"""Proves the compiled PTX of csrc/cuda free of races in every schedule, and equal to torch over the reals.

Runs `sentryward` (pip install "sentryward[reference]==0.1.1") on every kernel of ptx_kernels.py, at one fixed launch
each, and compares what it says with what is written there. Needs nvcc, not a GPU. docs/ptx_proofs.md says what the
answers mean, and has the table that --markdown prints.

    python .ci/ptx_proofs.py [--only router] [--self-test] [--markdown] [--jobs 4] [--timeout 600]
"""

import argparse
import ast
import dataclasses
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ptx_kernels import KERNELS, Proof, Tensor, index

ROOT = Path(__file__).parents[1]
REFERENCES = Path(__file__).with_name("ptx_references.py")
FUNCTIONS = {f.name: f for f in ast.parse(REFERENCES.read_text()).body if isinstance(f, ast.FunctionDef)}
OUT = ROOT / "build" / "ptx_proofs"
ELEMENT_BYTES = {"uint8": 1, "bfloat16": 2, "float16": 2, "float32": 4, "int32": 4, "int64": 8, "float64": 8}
SCALAR_BYTES = {"u32": 4, "u64": 8, "f32": 4, "f64": 8}
MISSING = {
    "nvcc": "nvcc was not found; put that of a CUDA toolkit >= 12.8 on PATH, or pip install nvidia-cuda-nvcc",
    "sentryward": 'sentryward was not found; pip install "sentryward[reference]==0.1.1"',
}


def tool(name: str) -> str:
    """Beside this Python, or on PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    return found or sys.exit(f"ptx_proofs: {MISSING[name]}")


def run(command: list, output: Path) -> tuple[int, str, float]:
    """-> (exit status, stdout and stderr, seconds of CPU, children included)"""
    with open(output, "w") as out, open(output.with_suffix(".err"), "w") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=os.environ | {"OMP_NUM_THREADS": "1"})
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    text = output.read_text() + output.with_suffix(".err").read_text()
    return process.returncode, text, usage.ru_utime + usage.ru_stime


def fields(parameters: list) -> list[tuple[int, int, object]]:
    """(parameter, offset, value) of all arguments, with structs laid out as C++ does."""
    found = []
    for number, parameter in enumerate(parameters):
        offset = 0
        for value in parameter if isinstance(parameter, list) else [parameter]:
            value = ("u64", value) if isinstance(value, int) else value
            size = 8 if isinstance(value, Tensor) else SCALAR_BYTES[value[0]]
            offset = -(-offset // size) * size
            found.append((number, offset, value))
            offset += size
    return found


def compile_kernel(proof: Proof, stem: Path, csrc: Path) -> tuple[Path, str, float]:
    """-> (PTX, entry, seconds)"""
    source, ptx = stem.with_suffix(".cu"), stem.with_suffix(".ptx")
    source.write_text(
        f'#include "cuda/{proof.header}"\nnamespace shiva::cuda {{\n'
        f"void* keep() {{ return reinterpret_cast<void*>(&{proof.kernel}); }}\n}}\n"
    )
    command = [tool("nvcc"), "-std=c++20", "-O3", "-arch=compute_100", "-ptx", f"-I{csrc}", "-o", str(ptx), str(source)]
    failed, text, seconds = run(command, stem.with_suffix(".nvcc"))
    if failed:
        sys.exit(f"ptx_proofs: {proof.kernel} does not compile:\n{text}")
    name = proof.kernel.split("<")[0]
    text = ptx.read_text()
    (entry,) = re.findall(rf"\.entry (\w*\D{len(name)}{name}\w*)\(", text)
    # The tool knows integer arguments by their value and floating ones not, so that these become constants.
    for number, offset, value in fields(proof.parameters):
        if isinstance(value, tuple) and value[0][0] == "f":
            form, prefix = (">f", "0f") if value[0] == "f32" else (">d", "0d")
            place = re.escape(f"{entry}_param_{number}" + (f"+{offset}" if offset else ""))
            constant = prefix + struct.pack(form, value[1]).hex().upper()
            text = re.sub(rf"ld\.param\.{value[0]}(\s+%\w+), \[{place}\];", rf"mov.{value[0]}\1, {constant};", text)
    ptx.write_text(text)
    return ptx, entry, seconds


def launch(proof: Proof, entry: str) -> dict:
    """The tool's `--input`: integers have values, pointers stay symbolic, the contents of an index are given."""
    arguments, pointers, contents = [], [], []
    for number, offset, value in fields(proof.parameters):
        at = {"parameter": number, "offset": offset}
        if not isinstance(value, Tensor):
            arguments.append(at | {"type": value[0], "value": value[1]})
            continue
        pointers.append(at | {"type": "pointer", "space": "global", "object": f"input.arg{number}.{offset}"})
        if value.values is not None:
            bits = 8 * ELEMENT_BYTES[value.dtype]
            unsigned = [v % 2**bits for v in value.values]
            contents.append(at | {"element_type": f"u{bits}", "shapes": [unsigned]})
    config = {
        "schema": "spverify.kernel-input/v1",
        "entry": entry,
        "launch": {
            "grid_dim": [proof.blocks, 1, 1],
            "block_dim": [proof.threads, 1, 1],
            "cluster_dim": [1, 1, 1],
            "dynamic_shared_bytes": 0,
        },
        "arguments": arguments,
        "declarations": pointers,
    }
    return config | ({"shape_arrays": contents} if contents else {})


def dense_strides(tensor: Tensor) -> list[int]:
    strides, size = [], ELEMENT_BYTES[tensor.dtype]
    for extent in reversed(tensor.shape):
        strides.insert(0, size)
        size *= extent
    return strides


def binding(proof: Proof) -> dict:
    """The tool's `--reference-binding`: which tensor is which of the reference's arguments and results."""
    allocations, tensors = {}, {}
    for number, offset, value in fields(proof.parameters):
        if isinstance(value, Tensor):
            name = f"input.arg{number}.{offset}"
            allocations[value.name], tensors[value.name] = f"6:global{len(name)}:{name}", value
    names = [a.arg for a in FUNCTIONS[proof.reference].args.args]
    read = [name for name, t in tensors.items() if name in names or not t.out]
    layouts = {}
    for name in read:
        strides = dense_strides(tensors[name])
        layouts[allocations[name]] = {
            "shape": list(tensors[name].shape),
            "element_bytes": ELEMENT_BYTES[tensors[name].dtype],
            **{f"{side}_offset": 0 for side in ("source", "target")},
            **{f"{side}_strides_bytes": strides for side in ("source", "target")},
        }
    inputs = {"layouts": layouts, "allocations": {allocations[name]: name for name in read}}
    results = [
        {
            "kind": "dense_tensor",
            "element_bytes": ELEMENT_BYTES[t.dtype],
            "shape": list(t.shape),
            **{f"{side}_allocation": allocations[name] for side in ("left", "right")},
            **{f"{side}_offset": 0 for side in ("left", "right")},
            **{f"{side}_strides_bytes": dense_strides(t) for side in ("left", "right")},
        }
        for name, t in tensors.items()
        if t.out
    ]
    arguments = [
        {"name": n, "allocation": allocations[n], "shape": list(tensors[n].shape), "dtype": tensors[n].dtype}
        for n in names
    ]
    return {
        "reference": {"arguments": arguments},
        "left_inputs": inputs,
        "right_inputs": inputs,
        "outputs": results[0] if len(results) == 1 else {"kind": "dense_tensors", "tensors": results},
    }


@dataclasses.dataclass
class Answer:
    result: str  # the tool's
    reason: str
    seconds: float


def examine(proof: Proof, name: str, timeout: float, csrc: Path = ROOT / "csrc") -> Answer:
    stem = OUT / name
    ptx, entry, compiling = compile_kernel(proof, stem, csrc)
    stem.with_suffix(".json").write_text(json.dumps(launch(proof, entry)))
    command = [tool("sentryward"), str(ptx), "--input", str(stem.with_suffix(".json")), "--timeout", str(timeout)]
    if proof.reference:
        reference, bound = stem.with_suffix(".py"), stem.with_suffix(".binding.json")
        reference.write_text(
            f"import sys\n\nsys.path.insert(0, {str(REFERENCES.parent)!r})\n"
            f"from ptx_references import {proof.reference} as reference  # noqa\n"
        )
        bound.write_text(json.dumps(binding(proof)))
        command += ["--reference", str(reference), "--reference-binding", str(bound)]
    output = stem.with_suffix(".report.json")
    _, text, seconds = run(command, output)
    seconds += compiling
    try:
        report = json.loads(output.read_text())
    except json.JSONDecodeError:
        return Answer("crash", text[-500:], seconds)
    result, checks = report["result"], report["checks"]
    # The exit status is 0 on findings too: only these words are an answer.
    needed = ["synchronization", "memory"] + ["equivalence"] * bool(proof.reference)
    if result in ("verified", "race_free") and any(checks[check] != "passed" for check in needed):
        result = f"{result}, but {checks}"
    reason = report["diagnostics"][0] if report["diagnostics"] else {}
    return Answer(result, f"{reason.get('code', '')} {reason.get('message', '')}".strip(), seconds)


def wanted(proof: Proof) -> str:
    return "unsupported" if proof.cannot else "verified" if proof.reference else "race_free"


def find(kernel: str, shape: str) -> Proof:
    return next(p for p in KERNELS if p.kernel == kernel and p.shape == shape)


def self_test(timeout: float) -> list[str]:
    """Kernels that are wrong, or wrongly used: each must be found out."""
    ring = find("router_product_kernel<MmaProduct<bf16, 32, 64, 2>, false, false, float>", "40 x 72, 72 deep")
    chunks = find("sum_chunks_kernel<float>", "B 2, 20 chunks, D 24")
    modulate = find("gather_modulate_kernel<float, 4, 8, true>", "B 2, N 3, k 2, D 16")
    scatter = find("token_scatter_in_place_kernel<uint4>", "B 2, N 6, k 6, 528 bytes a row")
    twice = [index("index", [[1, 1, 0, 2, 3, 4]] * 2) if isinstance(p, Tensor) else p for p in scatter.parameters]
    router, common = "router_score_kernel.cuh", "modulate_common.cuh"
    staged, reused = "__syncthreads();  // this stage is there", "wait_copies<kStages - 2>();"
    shared, chunk = "sums[warp][lane] = sum;\n  __syncthreads();", "c < chunks; c += kSumWarps"
    scale = "(1 + scales[i])"
    dispatch = find("expert_dispatch_kernel<uint4>", "T 5, K 2, E 3, 528 bytes a row")
    slot = "next[mine] + rank"
    scan, part = find("ema_scan_backward_kernel<float>", "B 2, M 2, D 130"), "at.channel / kWarp * B * M + at.b * M"
    cases = [
        ("no barrier before a stage is read", ring, router, staged, "//", "potential_race"),
        ("no wait for a stage's copies", ring, router, reused, "", "potential_race"),
        ("no barrier before sums are read", chunks, common, shared, shared.split("\n")[0], "potential_race"),
        (
            "a sum without one of its parts",
            chunks,
            common,
            "int w = 1; w <",
            "int w = 2; w <",
            "equivalence_not_proven",
        ),
        ("one element past the last read", chunks, common, chunk, chunk.replace("<", "<="), "equivalence_not_proven"),
        ("scale for 1 + scale", modulate, "gather_modulate_kernel.cuh", scale, "scales[i]", "equivalence_not_proven"),
        ("a row for two choices", dispatch, "expert_rows_kernel.cuh", slot, slot.split(" ")[0], "potential_race"),
        ("a place for all warps' sums", scan, "ema_scan_kernel.cuh", part, "at.b * M", "potential_race"),
        ("all of a gradient", scan, "ema_scan_kernel.cuh", "share * total", "total", "equivalence_not_proven"),
        ("a token twice", dataclasses.replace(scatter, parameters=twice), "", "", "", "potential_race"),
    ]
    complaints = []
    for what, proof, file, old, new, expected in cases:
        csrc = OUT / "mutated"
        shutil.rmtree(csrc, ignore_errors=True)
        shutil.copytree(ROOT / "csrc", csrc)
        if file:
            text = (csrc / "cuda" / file).read_text()
            if old not in text:
                sys.exit(f"ptx_proofs: {file} no longer has {old!r}; mend the self-test")
            (csrc / "cuda" / file).write_text(text.replace(old, new))
        answer = examine(proof, "self_test", timeout, csrc)
        print(f"self-test: {what}: {answer.result}: {answer.reason} ({answer.seconds:.1f} s)", flush=True)
        if answer.result != expected:
            complaints.append(f"self-test: {what}: {answer.result}, not {expected}")
    return complaints


def row(proof: Proof, answer: Answer) -> str:
    """Of the table in docs/ptx_proofs.md."""
    races, equal = (
        "none",
        f"`{ast.get_docstring(FUNCTIONS[proof.reference])}`" if proof.reference else f"– ({proof.why})",
    )
    if proof.cannot:
        races, equal = f"not possible: `{proof.cannot}`", f"– ({proof.why})"
    if answer.result != wanted(proof):
        races = equal = f"**{answer.result}**"
    return f"| `{proof.kernel}` | {proof.blocks} x {proof.threads} | {proof.shape} | {races} | {equal} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="kernels whose name has this")
    parser.add_argument("--self-test", action="store_true", help="also see that wrong kernels are found out")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/ptx_proofs.md")
    parser.add_argument("--jobs", type=int, default=1, help="proofs side by side")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one kernel")
    args = parser.parse_args()
    for name in MISSING:
        tool(name)
    OUT.mkdir(parents=True, exist_ok=True)

    said = {"verified": "equal and free of races", "race_free": "free of races", "unsupported": "not possible"}
    proofs = [(i, proof) for i, proof in enumerate(KERNELS) if args.only in proof.kernel]
    if not proofs:
        sys.exit(f"ptx_proofs: no kernel has {args.only!r} in its name; see .ci/ptx_kernels.py")
    complaints, counts, seconds = [], dict.fromkeys(said, 0), 0.0
    if args.markdown:
        print("| Kernel | Launch | Shape | Races | Equal to |\n|---|---|---|---|---|", flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        names = [f"{i:02d}_{proof.kernel.split('<')[0]}" for i, proof in proofs]
        answers = pool.map(lambda proof, name: examine(proof[1], name, args.timeout), proofs, names)
        for (_, proof), answer in zip(proofs, answers, strict=True):
            seconds += answer.seconds
            found = f"{said.get(answer.result, answer.result)} {answer.reason}".strip()
            if answer.result == wanted(proof) and answer.reason.startswith(proof.cannot):
                counts[answer.result] += 1
            else:
                complaints.append(f"{proof.kernel}, {proof.shape}: {found}; not: {said[wanted(proof)]} {proof.cannot}")
            line = f"{proof.kernel}, {proof.shape}: {found} ({answer.seconds:.1f} s)"
            print(row(proof, answer) if args.markdown else line, flush=True)
    complaints += self_test(args.timeout) if args.self_test else []
    for complaint in complaints:
        print(f"ptx_proofs: {complaint}")
    numbers = ", ".join(f"{counts[result]} {text}" for result, text in said.items())
    print(f"ptx_proofs: {numbers}; {len(complaints)} complaints; {seconds:.0f} s of CPU")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
