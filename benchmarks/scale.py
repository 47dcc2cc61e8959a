"""Time and memory of the selection path from 1,024 to 262,144 tokens: what one pruned layer costs besides the block.

    python benchmarks/scale.py [--channels 1536] [--most 262144] [--threads 2] [--out results/scale.json]

Each op at each length runs in a process of its own: its time is the median of the calls, its memory the peak above what
was resident before the first of them, the result included. bfloat16 tokens, 60 % kept; soft_rank, of training alone, at
tau = 0.2 on unit-variance scores. The last column is the growth of the time from half as many tokens, as a power of N.
As in bench_ops.py, memory is kept between calls: giving it back would cost more than most of the ops.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench_ops import KEEP_MEMORY

OPS = ("router_score", "topk_select", "token_gather", "token_scatter", "soft_rank", "soft_rank_backward")
SECONDS = 1.0  # of calls at least; and LEAST_CALLS
LEAST_CALLS = 3


def status(field: str) -> int:
    """KiB, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def measure(op: str, N: int, D: int, threads: int) -> dict:
    """Seconds of a call and peak bytes above the inputs."""
    import torch

    import shiva_ext  # noqa: F401

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    scores = torch.randn(1, N)

    def arguments(N: int) -> tuple:
        if op.startswith("soft_rank"):
            return (*([torch.randn(1, N)] if "backward" in op else []), scores[:, :N], 0.2)
        if op == "topk_select":
            return scores[:, :N], int(0.6 * N)
        x = torch.randn(1, N, D, dtype=torch.bfloat16)
        if op == "router_score":
            w = torch.randn(64, D, dtype=torch.bfloat16)
            return x, torch.randn(1, 64), w, *(torch.randn(64) for _ in range(3)), 1e-5
        kept = torch.ops.shiva.topk_select(scores[:, :N], int(0.6 * N))[0]
        return (x, kept) if op == "token_gather" else (x, kept, x[:, : kept.shape[1]].clone())

    call = getattr(torch.ops.shiva, op)
    call(*arguments(256))  # starts threads, fills tables
    inputs = arguments(N)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = status("VmRSS")
    call(*inputs)
    peak = status("VmHWM") - before
    times, started = [], time.perf_counter()
    while len(times) < LEAST_CALLS or time.perf_counter() - started < SECONDS:
        begin = time.perf_counter()
        call(*inputs)
        times.append(time.perf_counter() - begin)
    return {"op": op, "tokens": N, "seconds": statistics.median(times), "peak_bytes": max(peak, 0) * 1024}


def draw(rows: list[dict], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for axis, key, factor, label in (
        (axes[0], "seconds", 1e3, "milliseconds a call"),
        (axes[1], "peak_bytes", 2**-20, "peak MiB above the inputs"),
    ):
        for op in OPS:
            mine = [row for row in rows if row["op"] == op]
            axis.plot([row["tokens"] for row in mine], [row[key] * factor for row in mine], "o-", ms=3, label=op)
        axis.set_xscale("log", base=2)
        axis.set_yscale("symlog" if key == "peak_bytes" else "log")
        axis.set_xlabel("tokens")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, default=1536)
    parser.add_argument("--most", type=int, default=262144)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results/scale.json"))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # op and tokens, in a process of its own
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]), args.channels, args.threads)))
        return

    rows, N = [], 1024
    print(f"{'op':<20}{'tokens':>8}{'ms':>10}{'peak MiB':>10}{'growth':>8}")
    while args.most >= N:
        for op in OPS:
            command = [sys.executable, __file__, "--one", op, str(N), f"--channels={args.channels}"]
            command.append(f"--threads={args.threads}")
            environment = os.environ | KEEP_MEMORY
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout))
            last = next((row for row in rows if row["op"] == op and row["tokens"] == N // 2), None)
            growth = f"N^{math.log2(rows[-1]['seconds'] / last['seconds']):.2f}" if last else ""
            ms, mib = rows[-1]["seconds"] * 1e3, rows[-1]["peak_bytes"] / 2**20
            print(f"{op:<20}{N:>8}{ms:>10.3f}{mib:>10.1f}{growth:>8}", flush=True)
        N *= 2
    content = {"command": "python benchmarks/scale.py", "channels": args.channels, "threads": args.threads}
    temporary = args.out.with_suffix(".tmp")
    temporary.write_text(json.dumps(content | {"rows": rows}, indent=1) + "\n")
    os.replace(temporary, args.out)
    draw(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
