"""The experts of one layer: two-layer MLPs of the same shape, their weights stacked."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _gated(activation):
    def apply(x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * activation(gate)

    return apply


ACTIVATIONS = {
    "swiglu": _gated(F.silu),
    "geglu": _gated(F.gelu),
    "gelu": F.gelu,
    "gelu-approximate": lambda x: F.gelu(x, approximate="tanh"),
}
GATED = ("swiglu", "geglu")
WEIGHTS = ("w_in", "w_out", "b_in", "b_out")


def inner_rows(width: int, activation: str) -> int:
    """Outputs of the first linear layer: a gated activation needs twice the width, values first."""
    return 2 * width if activation in GATED else width


def feed_forward(dim: int, width: int, activation: str, bias: bool) -> nn.Sequential:
    """One such MLP, [...,D] -> [...,D], for the expert that all tokens pass."""
    return nn.Sequential(
        nn.Linear(dim, inner_rows(width, activation), bias=bias),
        Activation(activation),
        nn.Linear(width, dim, bias=bias),
    )


class Activation(nn.Module):
    """One of :data:`ACTIVATIONS` by name."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.name](x)

    def extra_repr(self) -> str:
        return self.name


class Experts(nn.Module):
    """E MLPs ``w_out act(w_in x + b_in) + b_out``.

    Args:
        activation: one of :data:`ACTIVATIONS`.
        w_in: [E,I,D]; I is the width W, or 2 W for a gated activation: values, then gates.
        w_out: [E,D,W].
        b_in, b_out: [E,I] and [E,D], or both None.
    """

    def __init__(self, activation: str, w_in: Tensor, w_out: Tensor, b_in: Tensor | None, b_out: Tensor | None):
        super().__init__()
        self.activation = activation
        for name, value in zip(WEIGHTS, (w_in, w_out, b_in, b_out), strict=True):
            setattr(self, name, None if value is None else nn.Parameter(value))

    @classmethod
    def new(cls, num_experts: int, dim: int, width: int, activation: str, bias: bool) -> "Experts":
        """Initialised as ``nn.Linear`` does it, expert by expert."""
        rows = inner_rows(width, activation)

        def uniform(fan_in: int, *shape: int) -> Tensor:
            bound = 1 / math.sqrt(fan_in)
            return torch.empty(num_experts, *shape).uniform_(-bound, bound)

        biases = (uniform(dim, rows), uniform(width, dim)) if bias else (None, None)
        return cls(activation, uniform(dim, rows, dim), uniform(width, dim, width), *biases)

    @property
    def num_experts(self) -> int:
        return len(self.w_in)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Experts":
        """New experts of each weight's result, which need a gradient where the weight does."""
        values = [getattr(self, name) for name in WEIGHTS]
        new = Experts(self.activation, *(None if v is None else function(v.detach()) for v in values))
        for name, value in zip(WEIGHTS, values, strict=True):
            if value is not None:
                getattr(new, name).requires_grad_(value.requires_grad)
        return new

    def forward(self, rows: Tensor, ends: Tensor | None = None) -> Tensor:
        """rows [R,D] sorted by expert, with ends int32 [E]; or [E,C,D], as many for each -> the same shape."""
        rows, w_in, w_out, b_in, b_out = self._cast(rows)
        expert = None
        if ends is not None and b_in is not None:
            row = torch.arange(len(rows), dtype=ends.dtype, device=rows.device)
            expert = torch.searchsorted(ends, row, right=True).clamp_max(self.num_experts - 1)

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            out = x @ weight.mT if ends is None else grouped_linear(x, weight, ends)
            if bias is None:
                return out
            return out + (bias.unsqueeze(1) if ends is None else bias[expert])

        return linear(ACTIVATIONS[self.activation](linear(rows, w_in, b_in)), w_out, b_out)

    def _cast(self, rows: Tensor) -> list[Tensor | None]:
        """The rows and weights in autocast's dtype, as torch does not do for grouped products; else in the weights'."""
        device = rows.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.w_in.dtype
        return [None if t is None else t.to(dtype) for t in (rows, *(getattr(self, name) for name in WEIGHTS))]


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Row r of x [R,I], of group g where ends[g-1] <= r < ends[g], times weight[g].T; weight [G,O,I] -> [R,O].

    By torch's own grouped GEMM, or one product a group where that takes neither the dtype nor the strides (rows must be
    multiples of 16 bytes; traced, bfloat16 alone).
    """
    size = x.element_size()
    aligned = all(width * size % 16 == 0 for width in weight.shape[1:])
    taken = x.dtype == torch.bfloat16 if torch.compiler.is_compiling() else x.dtype != torch.float64
    if aligned and taken and hasattr(F, "grouped_mm"):
        return F.grouped_mm(x.contiguous(), weight.mT, offs=ends)
    parts = x.split(ends.diff(prepend=ends.new_zeros(1)).tolist())
    return torch.cat([part @ matrix.mT for part, matrix in zip(parts, weight, strict=True)])
