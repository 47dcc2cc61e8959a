"""Every op on the GPU at hand: measured, predicted by roofline.py, plain torch, torch.compile, and other libraries.

    make bench-gpu       # or: python benchmarks/gpu_ops.py [--tokens 4096] [--channels 1536] [--dtype bfloat16]

Each forward result is checked against shiva_ext.reference before it is timed. Times are medians of single calls, by
CUDA events, after the second-level cache was overwritten. Without a GPU it says so and does nothing.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from roofline import GPUS, costs

from shiva_ext import reference

REPEATS, WARM_UP = 50, 10
TAU, EPS, KAPPA = 0.2, 1e-6, 0.1
COPIES = (
    "token_gather",
    "token_scatter",
    "token_scatter_",
    "residual_gate",
    "counterfactual_scatter",
    "expert_dispatch",
)
LOOPS = ("ema_scan",)  # in torch a step a token, which torch.compile would unroll


def median_seconds(call: Callable[[], object], scratch: torch.Tensor) -> float:
    """Median time of one call whose inputs are not in the cache any more."""
    times = []
    for repeat in range(WARM_UP + REPEATS):
        scratch.zero_()
        torch.cuda._sleep(2_000_000)  # about a millisecond, in which the host queues the whole call
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        if repeat >= WARM_UP:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def make_arguments(B: int, N: int, D: int, k: int, H: int, dtype: torch.dtype) -> dict[str, tuple]:
    """Arguments of each op, on the GPU."""

    def random(*shape, dtype=dtype):
        return torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)

    x, scores = random(B, N, D), random(B, N, dtype=torch.float32)
    kept = torch.ops.shiva.topk_select(scores, k)[0]
    weights = (random(H, D) / D**0.5, *(random(H, dtype=torch.float32) for _ in range(3)))
    pi = torch.rand(B, N, device="cuda")
    tiles = torch.nn.functional.normalize(x.float(), dim=-1).view(-1, 16, D)  # of 4 x 4 tokens
    flat, (share, experts) = x.flatten(0, 1), torch.rand(B * N, 16, device="cuda").topk(2)
    rows, place, _ = torch.ops.shiva.expert_dispatch(flat, experts, 16)
    return {
        "topk_select": (scores, k),
        "soft_rank": (scores, TAU),
        "token_gather": (x, kept),
        "token_scatter": (x, kept, random(B, k, D)),
        "token_scatter_": (x.clone(), kept, random(B, k, D)),
        "residual_gate": (x, pi, kept),
        "counterfactual_scatter": (x, kept, random(B, k, D), pi, random(B, N, D), KAPPA),
        "router_score": (x, random(B, H, dtype=torch.float32), *weights, EPS),
        "gather_modulate": (x, kept, random(B, D), random(B, D), EPS),
        "scatter_residual": (x, kept, random(B, k, D), random(B, D)),
        "scatter_mean": (x, torch.randint(k, (B, N), device="cuda"), k),
        "facility_location": (tiles @ tiles.transpose(1, 2), 8),
        "expert_dispatch": (flat, experts, 16),
        "expert_combine": (rows, place, share),
        "ema_scan": (x, torch.rand(B, N, device="cuda")),
    }


def tensors(result) -> list[torch.Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def print_rows(rows: list[dict]) -> None:
    table = Table(
        "op", "measured, us", "predicted, at least", "measured / predicted", "torch", "best rival", "torch / ours"
    )
    for row in rows:
        others, predicted = dict(row["others_us"]), row["predicted_us"]
        plain = others.pop("torch")
        best = min(others.items(), key=lambda item: item[1], default=None)
        table.add_row(
            row["op"],
            f"{row['measured_us']:.1f}",
            f"{predicted:.1f}" if predicted else "-",
            f"{row['measured_us'] / predicted:.2f}" if predicted else "-",
            f"{plain:.1f}",
            f"{best[0]} {best[1]:.1f}" if best else "-",
            f"{plain / row['measured_us']:.1f}",
        )
    Console(width=150).print(table)


def backward_call(function: Callable, arguments: tuple) -> Callable[[], object] | None:
    """The backward pass of an op alone, as autograd runs it; None if it has none."""
    if function in (torch.ops.shiva.token_scatter_, reference.token_scatter_):
        return None
    leaves = [a.detach().requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments]
    outputs = [t for t in tensors(function(*leaves)) if t.requires_grad]
    wanted = [a for a in leaves if torch.is_tensor(a) and a.requires_grad]
    if not outputs:
        return None
    gradients = [torch.randn_like(t) for t in outputs]
    return lambda: torch.autograd.grad(outputs, wanted, gradients, retain_graph=True, allow_unused=True)


def rivals(name: str, arguments: tuple) -> dict[str, Callable[[], object]]:
    """The same work by other means."""
    eager = getattr(reference, name)
    found: dict[str, Callable[[], object]] = {"torch": lambda: eager(*arguments)}
    if name not in LOOPS:
        compiled = torch.compile(eager)
        found["torch.compile"] = lambda: compiled(*arguments)
    if name == "topk_select":
        scores, k = arguments
        found["torch.topk alone"] = lambda: torch.topk(scores, k, sorted=False)
        if importlib.util.find_spec("flashinfer"):
            import flashinfer

            found["flashinfer.top_k"] = lambda: flashinfer.top_k(scores, k)
    return found


def check(name: str, arguments: tuple) -> None:
    """Exit unless the op equals the reference in float64, or exactly for indices."""
    wide = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments]
    result = getattr(torch.ops.shiva, name)(*arguments)
    result = arguments[0] if result is None else result  # the op works in place
    for got, exact in zip(tensors(result), tensors(getattr(reference, name)(*wide)), strict=True):
        exactly = name in COPIES or not got.is_floating_point()
        bound = 0 if exactly else 16 * max(torch.finfo(arguments[0].dtype).eps, 1e-5)
        error = (got.double() - exact.double()).abs().max().item() / max(exact.double().abs().max().item(), 1)
        if not error <= bound:  # NaN is no result either
            sys.exit(f"gpu_ops: {name} is off by {error:.3g} of its largest value; not timed")


def save(path: str, content: dict) -> None:
    """Write the command and content as JSON, whole or not at all."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps({"command": f"python {' '.join(sys.argv)}", **content}, indent=1) + "\n")
    os.replace(temporary, file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--channels", type=int, default=1536)
    parser.add_argument("--kept", type=float, default=0.6)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--out", default="results/gpu_ops.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_ops: no GPU was found; nothing is measured")
        return int(os.environ.get("SHIVA_REQUIRE_CUDA") == "1")

    dtype, k = getattr(torch, args.dtype), int(args.kept * args.tokens)
    device = torch.cuda.get_device_properties(0)
    gpu = next((g for g in GPUS if g.device == device.name), None)
    sizes = (args.rows, args.tokens, args.channels, k, args.hidden)
    predicted = costs(*sizes, size=dtype.itemsize)
    scratch = torch.empty(4 * max(device.L2_cache_size, 1 << 24), dtype=torch.uint8, device="cuda")
    rows = []
    print(f"{device.name}; B, N, D, k, H = {sizes}, {args.dtype}")
    if gpu is None:
        print(f"no prediction for it: roofline.py knows {', '.join(g.device for g in GPUS)}")
    for name, arguments in make_arguments(*sizes, dtype).items():
        check(name, arguments)
        op = getattr(torch.ops.shiva, name)
        calls = {name: ((lambda op=op, a=arguments: op(*a)), rivals(name, arguments))}
        if (backward := backward_call(op, arguments)) is not None:
            eager = getattr(reference, name)
            others = {"torch": backward_call(eager, arguments)}
            if name not in LOOPS:
                others["torch.compile"] = backward_call(torch.compile(eager), arguments)
            calls[f"{name} backward"] = backward, others
        for label, (ours, others) in calls.items():
            row = {
                "op": label,
                "measured_us": median_seconds(ours, scratch) * 1e6,
                "predicted_us": predicted[label].seconds(gpu) * 1e6 if gpu else None,
                "others_us": {other: median_seconds(call, scratch) * 1e6 for other, call in others.items()},
            }
            rows.append(row)
            # The compilations take minutes: what is measured so far is kept beside the last whole run.
            save(f"{args.out}.partial", {"gpu": device.name, "torch": torch.__version__, "rows": rows})
    print_rows(rows)
    os.replace(f"{args.out}.partial", args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
