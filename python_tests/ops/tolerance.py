"""How far a result may be from the reference.

The reference runs in float64 on the very same inputs, so its own error does not count. A result is right when

    |result - exact| <= u(out) * |exact|  +  4 * sqrt(terms) * (eps * |exact| + change + plain)  +  floor

* ``u(out)``, half an epsilon of the output's dtype: arithmetic is wide and the result is rounded once.
* ``sqrt(terms)``: rounding errors of a sum of that many terms add up like a random walk (Higham & Mary, SIAM J. Sci.
  Comput. 41, 2019); 4 is a safety factor. ``eps`` belongs to the dtype of the arithmetic: float32, or float64 for
  float64 inputs.
* ``change``: how far the exact result moves, at most within a row, when every input moves by a relative ``eps``: the
  conditioning of the op at these inputs. If an intermediate may be rounded to a half precision, ``eps`` is that one's.
* ``plain``: how far the reference itself is off, at most within a row, when it runs in float32 (scaled to the dtype of
  the arithmetic): cancellation between intermediates, as where the LayerNorm of two channels has almost no gradient.
* ``floor``: what an op may lose in absolute terms: :func:`pair_floor` of soft_rank, :func:`layer_norm_floor` of
  gather_modulate's gradient, :func:`combine_floor` of expert_combine, where a row of one channel says too little.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Target:
    """What one output must be: the exact values in float64, how far off each may be, the dtype. No bound: equal."""

    exact: Tensor
    bound: Tensor | None
    dtype: torch.dtype

    def complaint(self, actual: Tensor) -> str:
        """Why actual is wrong, or an empty string."""
        if actual.dtype != self.dtype or actual.shape != self.exact.shape:
            wanted = f"{self.dtype} {list(self.exact.shape)}"
            return f"got {actual.dtype} {list(actual.shape)}, wanted {wanted}"
        got, exact = actual.detach().cpu().double(), self.exact.to(self.dtype).double()
        wrong = (got.isnan() != exact.isnan()) | (got.isinf() | exact.isinf()) & ~got.isnan() & (got != exact)
        if self.bound is None:
            wrong |= ~got.isnan() & (got != exact)
        else:
            wrong |= got.isfinite() & ((got - self.exact).abs() > self.bound)
        if not wrong.any():
            return ""
        at = wrong.nonzero()[0].tolist()
        allowed = 0.0 if self.bound is None else self.bound[tuple(at)].item()
        wanted = self.exact[tuple(at)].item()
        return (
            f"{int(wrong.sum())} of {wrong.numel()} wrong, first at {at}: "
            f"got {got[tuple(at)].item()!r}, wanted {wanted!r} within {allowed:.3g}"
        )


def nudged(inputs: list[Tensor], eps: float) -> list[list[Tensor]]:
    """The inputs moved by a relative eps: up and down by turns, so that no row moves as a whole, and at random."""
    generator = torch.Generator().manual_seed(0)
    turns, random = [], []
    for t in inputs:
        turns.append(t * (1 - eps * (-1.0) ** torch.arange(t.numel(), dtype=t.dtype).reshape(t.shape)))
        random.append(t * (1 + eps * (torch.rand(t.shape, generator=generator, dtype=t.dtype).round() * 2 - 1)))
    return [turns, random]


def targets(
    exact_function: Callable[[list[Tensor]], list[Tensor]],
    inputs: list[Tensor],
    dtypes: list[torch.dtype],
    eps: float,
    arithmetic_eps: float,
    terms: int,
    floors: list[Tensor | float],
) -> list[Target]:
    """One target for each tensor that exact_function makes of the float64 inputs.

    Args:
        exact_function: the op in float64.
        inputs: all of its floating inputs, float64.
        dtypes: of the outputs.
        eps: of the coarsest rounding that the op may do on the way.
        arithmetic_eps: of the arithmetic.
        terms: added up into one element.
        floors: absolute allowance of each output.
    """
    exact = exact_function(inputs)
    moved = [exact_function(values) for values in nudged(inputs, eps)]
    plain, scale = exact_function([t.float() for t in inputs]), arithmetic_eps / torch.finfo(torch.float32).eps
    made = []
    for i, (value, dtype) in enumerate(zip(exact, dtypes, strict=True)):
        bound = torch.zeros_like(value)
        if value.numel():
            changes = [(m[i] - value).abs() for m in moved] + [scale * (plain[i] - value).abs()]
            change = torch.stack(changes).nan_to_num(0, 0, 0).amax(dim=(0, -1)).unsqueeze(-1)
            growth = 4 * max(terms, 1) ** 0.5 * (eps * value.abs() + change)
            info = torch.finfo(dtype)
            bound = info.eps / 2 * value.abs() + info.smallest_normal * info.eps + growth + floors[i]
        made.append(Target(value, bound, dtype))
    return made


def pair_floor(N: int, eps: float) -> float:
    """What N pairs of soft_rank may lose, each in sigmoid or in its derivative.

    A sigmoid within eps/2 of 0 or 1 may count as exactly that; such pairs lie outside the window |ds|/tau < ln(2/eps).
    Inside, the argument of an exponential is at most ln(2/eps) and carries half an eps of relative error, which sigmoid
    multiplies by at most a quarter; there are two exponentials to a pair.
    """
    window = torch.tensor(2 / eps).log().item()
    return N * eps * (0.5 + window / 4)


def layer_norm_floor(slope: Tensor, rows: Tensor, layer_norm_eps: float, eps: float) -> Tensor:
    """What the gradient of a LayerNorm without affine may lose in each row, [..., 1].

    From each slope its mean and its part along the row are subtracted, and the rest is divided by the row's deviation.
    Each of the three carries a rounding error relative to itself, also where nothing is left of them (one channel).
    """
    deviation = (rows.var(dim=-1, correction=0, keepdim=True) + layer_norm_eps).sqrt()
    return 3 * eps * slope.abs().amax(dim=-1, keepdim=True) / deviation


def combine_floor(rows: Tensor, place: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What a token's sum over its rows may lose, [T,D]: half an eps of each product, and of each sum of them."""
    products = weight.abs().unsqueeze(-1) * torch.nn.functional.pad(rows.abs(), (0, 0, 0, 1))[place.long()]
    return eps / 2 * place.shape[1] * products.nan_to_num(0, 0, 0).sum(dim=1)
