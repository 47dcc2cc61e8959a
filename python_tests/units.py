"""How far the CUDA kernels' values may be from the CPU kernels'.

In units of the arithmetic's epsilon and of the largest number of a row. Both sum in float32 (float64 for float64), each
in its own order; a half precision adds one rounding of the result on each side. router_score is held to the epsilon of
its inputs, as the CPU may round the hidden units of half precisions; its gradients sum over all tokens. A row of
expert_combine's weights' gradient is a token's few choices, each a sum over all channels, of which none may be large.
"""

import torch

UNITS, EXPERT_UNITS, ROUTER_UNITS = 16, 64, 128


def most_units(op: str) -> int:
    """The stated bound of an op."""
    return {"router_score": ROUTER_UNITS, "expert_combine": EXPERT_UNITS}.get(op, UNITS)


def units_apart(got: torch.Tensor, wanted: torch.Tensor, eps: float) -> float:
    """The largest distance in units of eps and of the row's largest number, less a rounding of each of the two."""
    exact = wanted.double()
    rounding = torch.finfo(got.dtype).eps * exact.abs() if got.dtype in (torch.bfloat16, torch.float16) else 0
    distance = ((got.double() - exact).abs() - rounding).clamp_min(0)
    if not distance.numel():
        return 0.0
    largest = exact.abs().amax(dim=-1, keepdim=True)
    return (distance / (eps * largest).clamp_min(torch.finfo(torch.float64).tiny)).max().item()
