"""Mutation run of the CUDA kernels: `make mutate`. Makes one mistake at a time in csrc/cuda and expects a test to fail.

Each barrier, guard, bound and index expression is a mutant (mutants.py). All of them are woven into one source, built
three times (plain, ASan and UBSan, race detector), and switched on one by one in forks of a pytest process (judge.py).
A mutant that the first build does not kill goes to the next. The survivors, and mutants that do not compile, must be
explained in survivors.json beside this file: {"<mutant id>": "<why no test can tell>"}. Verdicts are kept in
build/mutate under a hash of all that they depend on, so that a run can be interrupted and goes on.

    python -m python_tests.simt.mutate [--only topk_select] [--jobs 2] [--limit N] [--list] [--report FILE]
"""

import argparse
import hashlib
import importlib.machinery
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .mutants import HEADER, STORAGE, Mutant, mutants_of, weave
from .test_simulated import SELECTIONS, compiler_library

ROOT = Path(__file__).parents[2]
CUDA = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "simt"
OUT = ROOT / "build" / "mutate"
SURVIVORS = Path(__file__).with_name("survivors.json")
REFUSED = OUT / "refused.txt"  # ids of mutants that the compiler refuses
WANTED = 0.95


def included(file: Path) -> set[str]:
    """Names of the csrc/cuda files that a file includes, itself among them, through any number of steps."""
    names, queue = set(), [file.name]
    while queue:
        name = queue.pop()
        if name not in names and (CUDA / name).is_file():
            names.add(name)
            queue += re.findall(r'#include "cuda/([\w.]+)"', (CUDA / name).read_text())
    return names


def context(file: Path) -> str:
    """Changes when a verdict might: with the file, what it includes, the simulator and the tests."""
    digest = hashlib.sha256()
    files = [CUDA / name for name in sorted(included(file))]
    files += [path for folder in ("csrc/simt", "csrc/core", "python_tests/ops") for path in (ROOT / folder).glob("*.*")]
    for each in sorted([*files, *(ROOT / "csrc").glob("*.*")]):
        digest.update(each.read_bytes())
    digest.update(json.dumps(SELECTIONS).encode())
    return digest.hexdigest()[:10]


def compile_commands(variant: str) -> list[tuple[str, list[str]]]:
    """(source, compiler's arguments) of each kernel file."""
    entries = json.loads((BUILD / "compile_commands.json").read_text())
    wanted = f"_simt_{variant}_kernels.dir"
    return [(e["file"], shlex.split(e["command"])) for e in entries if wanted in e["command"]]


class Woven:
    """The kernels with their mutants in them, and the builds of that."""

    def __init__(self, mutants: list[Mutant], jobs: int):
        self.mutants, self.jobs, self.tree = mutants, jobs, OUT / "tree"
        ids = set(REFUSED.read_text().split("\n")) if REFUSED.is_file() else set()
        # Numbers of those that do not compile.
        self.refused = {n for n, mutant in enumerate(mutants) if mutant.id in ids}

    def write(self) -> None:
        shutil.rmtree(self.tree, ignore_errors=True)
        shutil.copytree(ROOT / "csrc", self.tree / "csrc", ignore=shutil.ignore_patterns("cpu"))
        for file in (self.tree / "csrc" / "cuda").iterdir():
            here = [(n, m) for n, m in enumerate(self.mutants) if m.file == file.name and n not in self.refused]
            file.write_text(weave(file.read_text(), here))
        (self.tree / "mutation.h").write_text(HEADER)
        (self.tree / "mutation.cpp").write_text(STORAGE.replace("{count}", str(len(self.mutants) + 1)))

    def digest(self) -> str:
        """Of the woven sources."""
        digest = hashlib.sha256()
        for file in sorted(path for path in self.tree.rglob("*") if path.is_file()):
            digest.update(file.read_bytes())
        return digest.hexdigest()

    def _objects(self, target: str):
        """What CMake has compiled for a target, without mutants."""
        return (BUILD / "CMakeFiles" / f"_simt_{target}.dir").rglob("*.o")

    def _compile(self, variant: str, source: str, command: list[str]) -> tuple[Path, str]:
        arguments = [a.replace(str(ROOT / "csrc"), str(self.tree / "csrc")) for a in command]
        target = OUT / variant / f"{Path(source).stem}.o"
        arguments[arguments.index("-o") + 1] = str(target)
        arguments += ["-include", str(self.tree / "mutation.h"), "-Werror=vla", "-fmax-errors=0", "-w"]
        done = subprocess.run(arguments, cwd=BUILD, capture_output=True, text=True)
        return target, done.stderr if done.returncode else ""

    def build(self, variant: str) -> Path:
        """The module's file. Mutants that the compiler refuses are taken out."""
        folder = OUT / variant
        stamp = folder / "stamp"
        if stamp.is_file() and stamp.read_text() == self.digest() + json.dumps(sorted(self.refused)):
            return next(folder.glob("*.so"))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        changed = {mutant.file for mutant in self.mutants}
        commands = [c for c in compile_commands(variant) if changed & included(Path(c[0]))]
        while True:
            with ThreadPoolExecutor(self.jobs) as pool:
                done = list(pool.map(lambda c: self._compile(variant, *c), commands))
            errors = "\n".join(error for _, error in done if error)
            if not errors:
                break
            places = set(re.findall(r"/cuda/([\w.]+):(\d+):\d+: error", errors))
            refused = {n for n, m in enumerate(self.mutants) if (m.file, str(m.line)) in places} - self.refused
            if not refused:
                lines = [line for line in errors.splitlines() if "error" in line]
                sys.exit("\n".join(["mutate: the woven sources do not compile:", *lines[:20]]))
            print(f"{len(refused)} mutants on {len(places)} lines do not compile", flush=True)
            self.refused |= refused
            with open(REFUSED, "a") as file:
                file.writelines(f"{self.mutants[n].id}\n" for n in sorted(refused))
            self.write()
        objects = {path.name.split(".")[0]: path for path in sorted(self._objects(f"{variant}_kernels"))}
        objects |= {path.stem: path for path in sorted(folder.glob("*.o"))}
        objects |= {path: path for path in sorted(self._objects(variant))}
        library = Path(torch.__file__).parent / "lib"
        module = folder / f"_simt_{variant}{importlib.machinery.EXTENSION_SUFFIXES[0]}"
        link = ["g++", "-shared", "-fPIC", "-o", module, *objects.values(), self.tree / "mutation.cpp"]
        link += [library / "libtorch_cpu.so", f"-Wl,-rpath,{library}"]
        link += ["-fsanitize=address,undefined"] if variant == "asan" else []
        subprocess.run([*map(str, link)], check=True)
        stamp.write_text(self.digest() + json.dumps(sorted(self.refused)))
        return module


def run_judges(variant: str, module: Path, total: int, mutants: list[tuple[int, str]], jobs: int) -> dict[str, dict]:
    """Verdicts of one build, by key."""
    files, chosen = SELECTIONS[variant]
    environment = os.environ | {"SHIVA_SIMT": variant, "SHIVA_SIMT_DIR": str(module.parent), "PYTHONPATH": str(ROOT)}
    environment |= {"SHIVA_CHECK_INDICES": "1", "OMP_NUM_THREADS": "1"}
    if variant == "asan":
        environment |= {"LD_PRELOAD": compiler_library("libasan.so"), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "python_tests.simt.judge", *files]
    command += ["-k", chosen] if chosen else []

    def start(name: str, part: list[tuple[int, str]]) -> subprocess.Popen:
        work = {"module": str(module), "total": total, "coverage": str(module.with_name("coverage.json"))}
        work |= {"mutants": part, "verdicts": str(OUT / f"verdicts.{variant}.jsonl")}
        file = module.with_name(f"work.{name}.json")
        file.write_text(json.dumps(work))
        log = open(module.with_name(f"log.{name}.txt"), "w")
        return subprocess.Popen(
            command, cwd=ROOT, env=environment | {"SHIVA_MUTATION": str(file)}, stdout=log, stderr=log
        )

    for name, parts in (("coverage", [[]]), ("judge", [mutants[i::jobs] for i in range(jobs)])):
        workers = [start(f"{name}{i}", part) for i, part in enumerate(parts)]
        if failed := [worker for worker in workers if worker.wait() not in (0, 5)]:
            logs = "".join(path.read_text()[-2000:] for path in module.parent.glob(f"log.{name}*.txt"))
            sys.exit(f"mutate: {len(failed)} of {len(workers)} judges of the {variant} build failed:\n{logs}")
    return read_verdicts(variant)


def read_verdicts(variant: str) -> dict[str, dict]:
    file = OUT / f"verdicts.{variant}.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return {verdict["key"]: verdict for verdict in map(json.loads, lines)}


def report(mutants: list[Mutant], keys: list[str], refused: set[int], file: Path | None) -> int:
    """Prints the count and the unexplained survivors; 0 if all is well."""
    verdicts = {variant: read_verdicts(variant) for variant in SELECTIONS}
    explained = json.loads(SURVIVORS.read_text()) if SURVIVORS.is_file() else {}
    killed = {variant: 0 for variant in SELECTIONS}
    survivors, unjudged = [], 0
    for number, (mutant, key) in enumerate(zip(mutants, keys, strict=True)):
        if number in refused:
            if mutant.id not in explained:
                print(f"DOES NOT COMPILE {mutant.id} {mutant}")
            continue
        killer = next((v for v in SELECTIONS if verdicts[v].get(key, {}).get("killed")), None)
        if killer:
            killed[killer] += 1
        elif all(key in verdicts[v] for v in SELECTIONS):
            survivors.append((mutant, verdicts["plain"][key]["tests"]))
        else:
            unjudged += 1
    for mutant, tests in survivors:
        if mutant.id not in explained:
            print(f"SURVIVED ({tests} tests come by) {mutant.id} {mutant}")
    total = sum(killed.values()) + len(survivors)
    unexplained = sum(mutant.id not in explained for mutant, _ in survivors)
    share = sum(killed.values()) / max(total, 1)
    print(
        f"{total} mutants: {', '.join(f'{n} killed by {v}' for v, n in killed.items())}, {len(survivors)} survived "
        f"({unexplained} unexplained); {share:.1%} killed. {len(refused)} do not compile, {unjudged} are not judged yet"
    )
    if file:
        found = {"killed": killed, "survived": len(survivors), "share": share, "not_compiling": len(refused)}
        file.write_text(json.dumps(found | {"command": "make mutate"}, indent=1) + "\n")
    unexplained += sum(mutants[number].id not in explained for number in refused)
    return 1 if unexplained or unjudged or share < WANTED else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="mutate the files whose name holds this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=int, help="judge at most so many new mutants, evenly spread")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    parser.add_argument("--report", type=Path, help="write the counts to this JSON file")
    args = parser.parse_args()

    OUT.mkdir(parents=True, exist_ok=True)
    files = [f for f in sorted(CUDA.iterdir()) if not args.only or args.only in f.name]
    mutants = [mutant for file in files for mutant in mutants_of(file)]
    contexts = {file.name: context(file) for file in files}
    keys = [f"{m.id}:{contexts[m.file]}" for m in mutants]
    if args.list:
        print(*mutants, f"{len(mutants)} mutants", sep="\n")
        return 0

    woven = Woven(mutants, args.jobs)
    woven.write()
    living = list(range(len(mutants)))
    if args.limit is not None and len(living) > args.limit:
        living = [living[i * len(living) // args.limit] for i in range(args.limit)]
    for variant in SELECTIONS:
        known = read_verdicts(variant)
        if any(keys[n] not in known for n in living) or variant == "plain":
            print(f"== {variant}: building ==", flush=True)
            module = woven.build(variant)
            waiting = [(n, keys[n]) for n in living if keys[n] not in known and n not in woven.refused]
            print(f"== {variant}: judging {len(waiting)} mutants ==", flush=True)
            known = run_judges(variant, module, len(mutants), waiting, args.jobs) if waiting else known
        living = [n for n in living if n not in woven.refused and not known[keys[n]]["killed"]]
        print(f"{len(living)} still live", flush=True)
    return report(mutants, keys, woven.refused, args.report)


if __name__ == "__main__":
    sys.exit(main())
