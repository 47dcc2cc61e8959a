"""A pytest plugin that runs the collected tests on one woven build, once for every mutant in it. For mutate.py.

Tests are collected once; each mutant then gets a forked process. First every test runs without a mutant, and its time
and the mutants' places that it came by are noted: a mutant is judged by tests that come by it: the quickest of those
that differ in their dtype only, then the next, as many as take MOST_TIME together (what gets by counts as a survivor).

``SHIVA_MUTATION`` names a JSON file: {"module": of the woven build, "total": mutants in it, "coverage": file with the
first run's notes, written if absent, "mutants": [[number, key], ...], "verdicts": file to add lines of JSON to}.
"""

import ctypes
import json
import mmap
import os
import re
import signal
import time
from pathlib import Path

LEAST_TIME, SLOWER = 20, 20  # a test may take SLOWER times what it took, and LEAST_TIME seconds at least
MOST_TIME = 20  # seconds that the tests of one mutant take without it


class Build:
    """The woven module's switch, and the bytes that tell which places were passed, in memory shared with all forks."""

    def __init__(self, module: str, total: int):
        self.library = ctypes.CDLL(module)
        self.switch = ctypes.c_int.in_dll(self.library, "shiva_mutant")
        self.memory = mmap.mmap(-1, total + 1)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        ctypes.c_void_p.in_dll(self.library, "shiva_mutants_reached").value = address

    def forget(self) -> None:
        self.memory[:] = bytes(len(self.memory))

    def reached(self) -> list[int]:
        return [number for number, byte in enumerate(self.memory[:]) if byte]


def in_child(body) -> int:
    """Run body in a fork, silently; its return value, or 128 + the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            code = body()
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def run_item(session, item, following, seconds: float) -> bool:
    """Whether the test passed. The alarm's own action ends the process: a kernel that hangs runs no Python."""
    signal.alarm(int(seconds) + 1)
    before = session.testsfailed
    item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
    signal.alarm(0)
    return session.testsfailed == before


def observe(session, build: Build, file: Path) -> dict:
    """{test: [seconds, [mutants that it comes by]]} of a run without a mutant."""

    def body() -> int:
        notes, items = {}, session.items
        for place, item in enumerate(items):
            build.forget()
            started = time.monotonic()
            if not run_item(session, item, items[place + 1] if place + 1 < len(items) else None, 600):
                file.with_suffix(".failed").write_text(item.nodeid)
                return 1
            notes[item.nodeid] = [round(time.monotonic() - started, 3), build.reached()]
        file.with_suffix(".tmp").write_text(json.dumps(notes))
        os.replace(file.with_suffix(".tmp"), file)
        return 0

    if in_child(body) != 0:
        failed = file.with_suffix(".failed")
        raise SystemExit(f"without a mutant a test fails: {failed.read_text() if failed.is_file() else 'crash'}")
    return json.loads(file.read_text())


def without_dtype(name: str) -> str:
    return re.sub(r"torch\.\w+", "", name)


def affordable(tests: dict) -> list:
    """The tests that a mutant gets. tests: {test: (the group it is of, its seconds)}"""
    turns: dict[str, int] = {}
    order = []
    for test, (group, seconds) in sorted(tests.items(), key=lambda entry: entry[1][1]):
        turns[group] = turns.get(group, 0) + 1
        order.append((turns[group], seconds, len(order), test))
    chosen, spent = [], 0.0
    for _, seconds, _, test in sorted(order, key=lambda entry: entry[:3]):
        if spent + seconds <= MOST_TIME:
            spent += seconds
            chosen.append(test)
    return chosen


def judge(session, build: Build, number: int, notes: dict) -> dict:
    """{"killed": bool, "tests": how many came by the mutant, "by": the test that failed}"""
    reached = [item for item in session.items if number in notes[item.nodeid][1]]
    chosen = affordable({item: (without_dtype(item.nodeid), notes[item.nodeid][0]) for item in reached})
    progress = mmap.mmap(-1, 8)

    def body() -> int:
        build.switch.value = number
        for place, item in enumerate(chosen):
            progress[:] = place.to_bytes(8, "little")
            following = chosen[place + 1] if place + 1 < len(chosen) else None
            if not run_item(session, item, following, max(LEAST_TIME, SLOWER * notes[item.nodeid][0])):
                return 1
        return 0

    killed = bool(chosen) and in_child(body) != 0
    by = chosen[int.from_bytes(progress[:], "little")].nodeid.split("::")[-1] if killed else ""
    return {"killed": killed, "tests": len(reached), "by": by}


def pytest_runtestloop(session) -> bool:
    work = json.loads(Path(os.environ["SHIVA_MUTATION"]).read_text())
    build, coverage = Build(work["module"], work["total"]), Path(work["coverage"])
    notes = json.loads(coverage.read_text()) if coverage.is_file() else observe(session, build, coverage)
    notes = {name: (seconds, set(reached)) for name, (seconds, reached) in notes.items()}
    with open(work["verdicts"], "a") as verdicts:
        for number, key in work["mutants"]:
            print(json.dumps({"key": key} | judge(session, build, number, notes)), file=verdicts, flush=True)
    return True
