"""Every op on this machine's processor, against the ways to do the same in torch, in one process.

    python benchmarks/bench_ops.py [--ops topk_select ...] [--quick] [--threads 2] [--out results/bench_ops.json]

The file keeps what it has of ops that are not measured this time.

Each result is checked against shiva_ext.reference before it is timed. The candidates of a case take turns in random
order, so that other work on the machine hits all alike; printed are the median, the 10th and 90th percentile of the
time, and the median over the rounds of rival / ours. `--quick` has few shapes and rounds.

glibc gives large blocks back to the system at once, and a fresh one costs a page fault for each 4 KiB: ten times what
copying into it takes, for whoever allocates it. The benchmark keeps its memory instead (MALLOC_MMAP_THRESHOLD_), as
other allocators do, for us and for the rivals alike. `--fresh-memory` leaves that out.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from bench_cases import OPS, TARGETS, Case, cases
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

SLICE_SECONDS = 0.02  # a candidate is called until this much time has gone by, at least once
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 36), "MALLOC_TRIM_THRESHOLD_": str(1 << 36)}
COPY_BYTES = 1 << 29  # well past any last-level cache


def timed(call) -> float:
    """Seconds of one call."""
    calls, started = 0, time.perf_counter()
    while True:
        call()
        calls += 1
        elapsed = time.perf_counter() - started
        if elapsed >= SLICE_SECONDS:
            return elapsed / calls


def measure(candidates: dict, rounds: int) -> dict[str, list[float]]:
    """{name: seconds of a call in each round}; one round more comes first, to warm up."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    for turn in range(rounds + 1):
        random.shuffle(order)
        for name in order:
            seconds = timed(candidates[name])
            if turn:
                times[name].append(seconds)
    return times


def processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].split(": ")[1] if names else platform.machine()


def copy_bandwidth() -> float:
    """Bytes a second that torch's copy reads and writes, on arrays that no cache holds."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / statistics.median(measure({"copy": lambda: target.copy_(source)}, 10)["copy"])


def quantiles(times: list[float]) -> dict[str, float]:
    deciles = statistics.quantiles(times, n=10)
    found = {"median_us": statistics.median(times), "p10_us": deciles[0], "p90_us": deciles[-1]}
    return {name: float(f"{seconds * 1e6:.4g}") for name, seconds in found.items()}


def run(case: Case, rounds: int, bandwidth: float) -> dict:
    case.check()
    times = measure({"ours": case.ours, **case.rivals}, rounds)
    row = {"op": case.op, "shape": case.shape, "dtype": case.dtype, "kept": case.kept}
    row["times"] = {name: quantiles(values) for name, values in times.items()}
    row["ratio"] = {
        name: round(statistics.median(other / ours for other, ours in zip(times[name], times["ours"], strict=True)), 3)
        for name in case.rivals
    }
    if case.bytes_moved:
        row["share_of_copy_bandwidth"] = round(case.bytes_moved / statistics.median(times["ours"]) / bandwidth, 3)
    return row


def print_rows(rows: list[dict]) -> None:
    table = Table("op", "shape", "dtype", "k/N", "ours, us (p10 to p90)", "times faster than", "of copy speed")
    for row in rows:
        ours = row["times"]["ours"]
        table.add_row(
            row["op"],
            "x".join(map(str, row["shape"])),
            row["dtype"],
            f"{row['kept']:.1f}" if row["kept"] else "",
            f"{ours['median_us']:.0f} ({ours['p10_us']:.0f} to {ours['p90_us']:.0f})",
            ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratio"].items()),
            f"{row['share_of_copy_bandwidth']:.0%}" if "share_of_copy_bandwidth" in row else "",
        )
    Console(width=170).print(table)


def print_targets(rows: list[dict]) -> list[dict]:
    """Each goal of bench_cases.TARGETS with the worst case that it speaks of."""
    found = []
    for target in TARGETS:
        values = [value for row in rows if (value := target.value(row)) is not None]
        if values:
            worst = min(values)
            verdict = "met" if worst >= target.least else "MISSED"
            print(f"{verdict}: {target.text}: {worst:.2f} in the worst of {len(values)} cases")
            found.append({"target": target.text, "least": target.least, "worst": worst, "cases": len(values)})
    return found


def draw(rows: list[dict], file: Path) -> None:
    """One panel an op: each rival's time over ours, by the number of tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ops = list(dict.fromkeys(row["op"] for row in rows if row["ratio"]))
    columns = 4
    figure, axes = plt.subplots(
        -(-len(ops) // columns), columns, figsize=(16, 3.2 * -(-len(ops) // columns)), constrained_layout=True
    )
    for axis, op in zip(axes.flat, ops, strict=False):
        mine = [row for row in rows if row["op"] == op and row["ratio"]]
        for name in dict.fromkeys(name for row in mine for name in row["ratio"]):
            points = [(row["shape"][0] * row["shape"][1], row["ratio"][name]) for row in mine if name in row["ratio"]]
            axis.plot(*zip(*points, strict=True), "o", ms=3, alpha=0.6, label=name)
        axis.axhline(1, color="gray", lw=0.8)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(op, fontsize=10)
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(ops) :]:
        axis.set_visible(False)
    figure.supxlabel("tokens of the batch")
    figure.supylabel("times faster than")
    figure.savefig(file, dpi=100)


def one_row_a_line(content: dict) -> str:
    rows = ",\n".join("  " + json.dumps(row) for row in content["rows"])
    return json.dumps(content | {"rows": []}, indent=1).replace('"rows": []', f'"rows": [\n{rows}\n ]') + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--out", type=Path, default=Path("results/bench_ops.json"))
    parser.add_argument("--fresh-memory", action="store_true", help="let each large result cause page faults")
    args = parser.parse_args()
    if not args.fresh_memory and not KEEP_MEMORY.items() <= os.environ.items():
        os.execve(
            sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY
        )  # glibc reads them at the start
    torch.manual_seed(0)
    random.seed(0)
    torch.set_num_threads(args.threads)
    rounds = args.rounds or (5 if args.quick else 10)
    bandwidth = copy_bandwidth()
    print(f"{args.threads} threads; copying reads and writes {bandwidth / 1e9:.1f} GB/s")
    rows = [run(case, rounds, bandwidth) for case in tqdm(cases(args.ops, args.quick), unit="case")]
    print_rows(rows)
    if args.out.is_file():  # of an earlier run of other ops
        measured = {row["op"] for row in rows}
        rows = [row for row in json.loads(args.out.read_text())["rows"] if row["op"] not in measured] + rows
    content = {
        "command": "python benchmarks/bench_ops.py" + (" --quick" if args.quick else ""),
        "machine": {"processor": processor(), "threads": args.threads},
        "memory_is_kept": not args.fresh_memory,
        "torch": torch.__version__,
        "copy_bytes_per_s": bandwidth,
        "rows": rows,
        "targets": print_targets(rows),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.out.with_suffix(".tmp")
    temporary.write_text(one_row_a_line(content))
    os.replace(temporary, args.out)
    draw(rows, args.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
