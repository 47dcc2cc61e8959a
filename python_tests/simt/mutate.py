"""Mutation run of the CUDA kernels: `make mutate`. Changes one thing at a time in csrc/cuda and expects a test to fail.

For every barrier, guard, bound and index expression it compiles the changed kernel into a simulated module, runs the
tests of the ops that use it (under ASan and UBSan, then under the race detector), and notes whether any failed. The
survivors must
be explained in survivors.json beside this file: {"<mutant id>": "<why no test can tell>"}. Finished mutants are kept in
build/mutate/results.json under a hash of all that they depend on, so that a run can be interrupted and goes on.

    python -m python_tests.simt.mutate [--only topk_select_kernel] [--jobs 2] [--limit N] [--list]
"""

import argparse
import concurrent.futures
import hashlib
import importlib.machinery
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from .test_simulated import compiler_library

ROOT = Path(__file__).parents[2]
CUDA = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "simt"
OUT = ROOT / "build" / "mutate"
SURVIVORS = Path(__file__).with_name("survivors.json")
RESULTS = OUT / "results.json"
TIMEOUT = 300  # seconds; a mutant that hangs is killed, in both senses
HARNESS = {"launch.h", "launch.cu"}  # host code, tested by the ops' error tests, not mutated

# (name, pattern, replacement): each match in code is one mutant. clang-format puts spaces around binary operators and
# none inside template brackets, which tells the two uses of < apart. "if" conditions are found by their parentheses.
RULES = [
    ("barrier", r"__syncthreads\(\);", ";"),
    ("barrier", r"__syncwarp\([^;]*\);", ";"),
    ("wait", r"\b\w*(?:_wait|wait_)\w*<[^;]*>\(\);", ";"),
    ("commit", r"\b\w*commit\w*\(\);", ";"),
    ("bound", r" < ", " <= "),
    ("bound", r" <= ", " < "),
    ("bound", r" > ", " >= "),
    ("bound", r" >= ", " > "),
    ("guard", r" && [^&|?;]+?(?=\)| \?| &&| \|\||;)", ""),
    ("index", r"(?<=\w)\[([^\[\]]+)\](?! *\))", r"[(\1) + 1]"),
]
SKIP = re.compile(r"^\s*(//|#|template|using|static_assert|constexpr|asm|SHIVA_SHARED|SHIVA_DYNAMIC)|\[\] *\{")


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int
    rule: str
    old: str
    new: str
    occurrence: int

    @property
    def id(self) -> str:
        """Stable while the line's own text is: does not depend on its number."""
        digest = hashlib.sha256(
            f"{self.file}\0{self.rule}\0{self.old}\0{self.new}\0{self.occurrence}".encode()
        ).hexdigest()[:10]
        return f"{self.file}:{self.rule}:{digest}"


def without_guard(code: str) -> str | None:
    """The line with its first run-time condition always true; None if it has none, or not the whole of it."""
    match = re.search(r"\bif \(", code)
    if not match or "if constexpr" in code:
        return None
    depth = 0
    for end in range(match.end() - 1, len(code)):
        depth += {"(": 1, ")": -1}.get(code[end], 0)
        if depth == 0:
            return f"{code[: match.end()]}true{code[end:]}"
    return None


def mutants_of(file: Path) -> list[Mutant]:
    """One mutant for every match of a rule in the file's kernels."""
    found, seen = [], {}
    for number, text in enumerate(file.read_text().splitlines(), 1):
        code = text.split("//")[0].rstrip()
        if not code or SKIP.search(code):
            continue
        changed = [("guard", without_guard(code))]
        for rule, pattern, replacement in RULES:
            for match in re.finditer(pattern, code):
                changed.append((rule, code[: match.start()] + match.expand(replacement) + code[match.end() :]))
        for rule, new in changed:
            # The same line may stand in several kernels: they are told apart by how often it came before.
            if new is not None:
                before = seen[code, rule, new] = seen.get((code, rule, new), 0) + 1
                found.append(Mutant(file.name, number, rule, code.strip(), new.strip(), before))
    return found


def included(file: Path) -> set[str]:
    """Names of the csrc/cuda files that a file includes, itself among them, through any number of steps."""
    names, queue = set(), [file.name]
    while queue:
        name = queue.pop()
        if name not in names and (CUDA / name).is_file():
            names.add(name)
            queue += re.findall(r'#include "cuda/([\w.]+)"', (CUDA / name).read_text())
    return names


def users(name: str) -> list[str]:
    """Stems of the .cu files that a kernel file is part of."""
    return sorted(cu.stem for cu in CUDA.glob("*.cu") if cu.name not in HARNESS and name in included(cu))


def compile_commands(variant: str) -> dict[str, list[str]]:
    """The compiler's arguments for each .cu file, by stem."""
    commands = {}
    for entry in json.loads((BUILD / "compile_commands.json").read_text()):
        if f"_simt_{variant}_kernels.dir" in entry.get("output", entry["command"]) and entry["file"].endswith(".cu"):
            commands[Path(entry["file"]).stem] = shlex.split(entry["command"])
    return commands


def build(variant: str, stems: list[str], tree: Path, out: Path) -> bool:
    """Compile the stems from a changed tree and link them with everything else as it was built."""
    objects = {}
    kernels = BUILD / "CMakeFiles" / f"_simt_{variant}_kernels.dir" / "csrc" / "cuda"
    for path in kernels.glob("*.o"):
        objects[path.name.split(".")[0]] = path
    commands = compile_commands(variant)
    for stem in stems:
        arguments = [a.replace(str(ROOT / "csrc"), str(tree / "csrc")) for a in commands[stem]]
        target = out / f"{stem}.{variant}.o"
        arguments[arguments.index("-o") + 1] = str(target)
        if subprocess.run(arguments, cwd=BUILD, capture_output=True).returncode:
            return False
        objects[stem] = target
    rest = sorted((BUILD / "CMakeFiles" / f"_simt_{variant}.dir").rglob("*.o"))
    library = Path(torch.__file__).parent / "lib"
    module = out / f"_simt_{variant}{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    link = [
        "g++",
        "-shared",
        *(["-fsanitize=address,undefined"] if variant == "asan" else []),
        "-o",
        module,
        *rest,
        *objects.values(),
        library / "libtorch_cpu.so",
    ]
    return subprocess.run([*map(str, link), f"-Wl,-rpath,{library}"], capture_output=True).returncode == 0


def tests_fail(variant: str, stems: list[str], out: Path) -> bool:
    environment = os.environ | {"SHIVA_SIMT": variant, "SHIVA_SIMT_DIR": str(out), "PYTHONPATH": str(ROOT)}
    environment |= {"SHIVA_CHECK_INDICES": "1", "OMP_NUM_THREADS": "1"}
    chosen = f"({' or '.join(stems)})"
    if variant == "asan":
        environment |= {"LD_PRELOAD": compiler_library("libasan.so"), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["python_tests/ops/test_matrix.py", "python_tests/ops/test_inplace.py", "python_tests/ops/test_sizes.py"]
    command += ["-k", chosen]
    try:
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=TIMEOUT).returncode != 0
    except subprocess.TimeoutExpired:
        return True


def judge(mutant: Mutant) -> str:
    """ "killed by ...", "does not compile", or "survived"."""
    out = OUT / mutant.id.replace(":", "_")
    shutil.rmtree(out, ignore_errors=True)
    tree = out / "tree"
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    file = tree / "csrc" / "cuda" / mutant.file
    lines = file.read_text().splitlines()
    lines[mutant.line - 1] = mutant.new
    file.write_text("\n".join(lines) + "\n")
    stems = users(mutant.file)
    try:
        for variant in ("asan", "race"):
            if not build(variant, stems, tree, out):
                return "does not compile"
            if tests_fail(variant, stems, out):
                return f"killed by {variant}"
        return "survived"
    finally:
        shutil.rmtree(out, ignore_errors=True)


def context() -> str:
    """Changes when a kernel's surroundings do: the simulator, the shared headers, the tests."""
    digest = hashlib.sha256()
    files = [*(ROOT / "csrc" / "simt").glob("*"), CUDA / "device.h", *(ROOT / "python_tests" / "ops").glob("*.py")]
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:10]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="mutate the files whose name holds this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=int, help="judge at most so many new mutants, evenly spread")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    args = parser.parse_args()

    OUT.mkdir(parents=True, exist_ok=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    where = context()
    files = [f for f in sorted(CUDA.iterdir()) if f.suffix in (".cuh", ".h") and f.name not in HARNESS]
    mutants, keys = [], {}
    for file in files:
        if args.only and args.only not in file.name or not users(file.name):
            continue
        text = hashlib.sha256(b"".join((CUDA / n).read_bytes() for n in sorted(included(file)))).hexdigest()[:10]
        for mutant in mutants_of(file):
            mutants.append(mutant)
            keys[mutant.id] = f"{mutant.id}:{text}:{where}"
    if args.list:
        for m in mutants:
            print(f"{m.id} line {m.line}: {m.old}  ->  {m.new}")
        print(f"{len(mutants)} mutants")
        return 0

    open_ones = [m for m in mutants if keys[m.id] not in results]
    if args.limit is not None and len(open_ones) > args.limit:
        open_ones = [open_ones[i * len(open_ones) // args.limit] for i in range(args.limit)]
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        judged = {pool.submit(judge, m): m for m in open_ones}
        for done, future in enumerate(concurrent.futures.as_completed(judged), 1):
            mutant = judged[future]
            results[keys[mutant.id]] = verdict = future.result()
            temporary = RESULTS.with_suffix(".tmp")
            temporary.write_text(json.dumps(results, indent=0))
            os.replace(temporary, RESULTS)
            print(
                f"[{done}/{len(open_ones)}] {verdict}: {mutant.file}:{mutant.line} {mutant.old} -> {mutant.new}",
                flush=True,
            )

    explained = json.loads(SURVIVORS.read_text()) if SURVIVORS.is_file() else {}
    counts, unexplained = {}, []
    for m in mutants:
        verdict = results.get(keys[m.id], "not judged")
        counts[verdict] = counts.get(verdict, 0) + 1
        if verdict == "survived" and m.id not in explained:
            unexplained.append(m)
    for m in unexplained:
        print(f"SURVIVED {m.id} line {m.line}: {m.old}  ->  {m.new}")
    killed = sum(n for verdict, n in counts.items() if verdict.startswith("killed"))
    living = counts.get("survived", 0)
    print(
        f"{counts}; {killed} of {killed + living} killed ({killed / max(killed + living, 1):.1%}), "
        f"{len(unexplained)} survivors without an explanation"
    )
    return 1 if unexplained or killed < 0.95 * (killed + living) else 0


if __name__ == "__main__":
    sys.exit(main())
