"""What each op costs on a GPU at the least, from the bytes it moves and the operations it does; no GPU is needed.

    python benchmarks/roofline.py [--rows 2] [--tokens 4096] [--channels 1536] [--kept .6] [--hidden 64]

Prints the table of docs/gpu_performance.md. `benchmarks/gpu_ops.py` sets measured times beside these.
"""

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Peak rates of one GPU, from its data sheet.

    Attributes:
        bandwidth: bytes a second from memory.
        tensor: multiply-adds of bf16 with fp32 sums, in operations (2 each) a second, dense.
        fp32: instructions on the ordinary cores a second: 128 a clock and multiprocessor.
        device: what torch calls it.
    """

    name: str
    bandwidth: float
    tensor: float
    fp32: float
    device: str


H100 = Gpu("H100 SXM", 3.35e12, 989e12, 132 * 128 * 1.83e9, "NVIDIA H100 80GB HBM3")
RTX4090 = Gpu("RTX 4090", 1.008e12, 165e12, 128 * 128 * 2.52e9, "NVIDIA GeForce RTX 4090")
GPUS = (H100, RTX4090)
LAUNCH = 2.5e-6  # seconds from one kernel's start to the next one's, back to back on a stream


@dataclass(frozen=True)
class Cost:
    """Of one call: bytes moved, tensor-core operations, instructions on the ordinary cores, kernels launched."""

    bytes: float
    tensor: float = 0
    fp32: float = 0
    launches: int = 1

    def parts(self, gpu: Gpu) -> dict[str, float]:
        """Seconds that each resource needs."""
        return {
            "memory": self.bytes / gpu.bandwidth,
            "tensor cores": self.tensor / gpu.tensor,
            "arithmetic": self.fp32 / gpu.fp32,
        }

    def seconds(self, gpu: Gpu) -> float:
        """The slowest resource's, and the gaps: each kernel of an op waits for the one before."""
        return max(*self.parts(gpu).values(), LAUNCH) + (self.launches - 1) * LAUNCH

    def bound(self, gpu: Gpu) -> str:
        """Name of what decides."""
        parts = self.parts(gpu) | {"launches": self.launches * LAUNCH}
        return max(parts, key=parts.get)


def costs(B: int, N: int, D: int, k: int, H: int, size: int = 2) -> dict[str, Cost]:
    """Every op's cost for x [B,N,D] of ``size`` bytes an element, k kept tokens, router width H, float32 scores."""
    token, index, score = D * size, 8, 4
    all_tokens, kept = B * N * token, B * k * token
    indices, inverse = B * k * index, 2 * 8 * B * N  # the inverse index is written and read
    sorting = (N > 512) + (N > 1024)  # short rows are not sorted; rows beyond one block's chunk are merged
    pairs = B * N * N / 2  # 11 instructions each, 14 in the backward
    # Sums over tokens: partial ones of chunks of rows (csrc/cuda/modulate_common.cuh) are written and read in float32.
    chunk = min(max(-(-B * k // 2048), 8), 32)
    partial = 2 * B * -(-k // chunk) * D * 4
    sorting_groups = 2 * index * B * N * -(-k // 512) + 2 * 4 * B * k
    choices = 2 * B * N
    carries = 2 * B * -(-N // 64) * D * 4  # what each chunk of tokens leaves behind, written and read
    splits = -(-B * N // max(-(-B * N // 16 // 32) * 32, 512))
    return {
        "topk_select": Cost(B * N * (score + index)),
        "soft_rank": Cost(2 * B * N * score, fp32=11 * pairs, launches=sorting + 2),
        "soft_rank backward": Cost(3 * B * N * score, fp32=14 * pairs, launches=sorting + 2),
        "token_gather": Cost(2 * kept + indices),
        "token_gather backward": Cost(kept + all_tokens + indices + inverse, launches=2),
        "token_scatter": Cost(2 * all_tokens + indices + inverse, launches=2),
        "token_scatter_": Cost(2 * kept + indices),
        "token_scatter backward": Cost(2 * all_tokens + kept + indices + inverse, launches=2),
        "residual_gate": Cost(2 * all_tokens + kept + indices + inverse, launches=2),
        "residual_gate backward": Cost(3 * all_tokens + kept + indices + inverse + B * N * score, launches=2),
        "counterfactual_scatter": Cost(2 * all_tokens + indices + inverse, launches=2),
        "counterfactual_scatter backward": Cost(
            3 * all_tokens + 3 * kept + indices + inverse + B * N * score, launches=2
        ),
        "router_score": Cost(all_tokens + H * token + B * N * score, tensor=2 * B * N * D * H),
        "router_score backward": Cost(
            3 * all_tokens + 3 * B * N * H * size + 3 * H * token + 2 * splits * H * D * 4,
            tensor=6 * B * N * D * H,
            launches=6,
        ),
        "gather_modulate": Cost(2 * kept + indices + 2 * B * token),
        "gather_modulate backward": Cost(2 * kept + all_tokens + indices + inverse + 2 * partial, launches=4),
        "scatter_residual": Cost(2 * all_tokens + kept + indices + inverse, launches=2),
        "scatter_residual backward": Cost(3 * kept + indices + partial, launches=2),
        # Means of k groups. Positions are read twice by every 512 groups, starts and order written and read in int32.
        "scatter_mean": Cost(all_tokens + kept + sorting_groups + 2 * 4 * B * N, launches=2),
        "scatter_mean backward": Cost(all_tokens + kept + sorting_groups / 2 + index * B * N, launches=2),
        # 8 of every 16 tokens. The similarities are transposed, then read from a cache; float64's rate is left out.
        "facility_location": Cost(3 * B * N * 16 * score + B * N // 2 * index, fp32=8 * 3 * B * N * 16, launches=2),
        # Two experts of 16 a token, whose row both read at once; the counts stay in a cache.
        "expert_dispatch": Cost(3 * all_tokens + 3 * index * choices, launches=2),
        "expert_dispatch backward": Cost(3 * all_tokens + index * choices),
        "expert_combine": Cost(3 * all_tokens + (index + score) * choices),
        # Which choice a row is: zeros, numbers, and read, in int32.
        "expert_combine backward": Cost(5 * all_tokens + (index + 3 * 4 + 2 * score) * choices, launches=3),
        # Chunks read the carries of all before them, from a cache. Backward each warp has its part of p's gradient.
        "ema_scan": Cost(3 * all_tokens + carries + 2 * B * N * score, launches=2),
        "ema_scan backward": Cost(5 * all_tokens + carries + (3 + 2 * -(-D // 128) * 4) * B * N * score, launches=3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--channels", type=int, default=1536)
    parser.add_argument("--kept", type=float, default=0.6)
    parser.add_argument("--hidden", type=int, default=64)
    args = parser.parse_args()
    table = costs(args.rows, args.tokens, args.channels, int(args.kept * args.tokens), args.hidden)
    print(
        "| op | MB moved | GFLOP | M instructions | launches | "
        + " | ".join(f"{g.name}, µs (bound by)" for g in GPUS)
        + " |"
    )
    print("|---|---:|---:|---:|---:|" + "---:|" * len(GPUS))
    for name, cost in table.items():
        times = " | ".join(f"{cost.seconds(g) * 1e6:.1f} ({cost.bound(g)})" for g in GPUS)
        print(
            f"| `{name}` | {cost.bytes / 1e6:.2f} | {cost.tensor / 1e9:.2f} | {cost.fp32 / 1e6:.0f} "
            f"| {cost.launches} | {times} |"
        )


if __name__ == "__main__":
    main()
