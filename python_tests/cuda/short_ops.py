"""Calls every op in each of its forms a few times on the GPU, for compute-sanitizer; says how many calls it made."""

import torch
from gpu_cases import Case
from ops.cases import OPS, SIZES, Size

# Beyond SIZES: rows that span several vectors, tiles and parts of a reduction, and a router that no tile holds.
MEDIUM = Size(B=2, N=300, k=180, D=264, H=72)
WIDE = Size(B=1, N=70, k=40, D=64, H=300)
# Rows in registers of one block, in several blocks, sorted and merged.
LONG_ROWS = [Size(B=2, N=N, k=N // 2, D=1, H=1) for N in (257, 1025, 4097, 33000)]


def main() -> None:
    calls = 0
    for key, op in OPS.items():
        for size in (SIZES["one token"], SIZES["odd"], SIZES["typical"], MEDIUM, WIDE):
            for dtype in [d for d in (torch.float32, torch.bfloat16) if d in op.dtypes]:
                for layout in ("contiguous", "sliced"):
                    Case(key, size, dtype, layout).run()
                    calls += 1
    for key in ("topk_select", "soft_rank"):
        for size in LONG_ROWS:
            Case(key, size, torch.float32).run()
            calls += 1
    torch.cuda.synchronize()
    print(f"{calls} calls")


if __name__ == "__main__":
    main()
