"""Typed wrappers of ``torch.ops.shiva``; :mod:`shiva_ext.reference` says in plain PyTorch what each computes.

Shapes: B batch rows, N tokens, D channels, k kept tokens, H router width; for experts T tokens of the whole batch, K
experts a token, E experts, R rows. Floating arguments may be float32, bfloat16, float16 or float64; sums are taken in
float32 (float64 for float64). Indices are int64 or int32, unique in a row; on the CPU their range is checked, and where
rows are written (in the backward pass of what gathers, too) that none is named twice. All ops repeat bit for bit for
any number of threads; router_score in half precision only as far as torch's matmul does. Wrong arguments raise
RuntimeError (or ValueError where a wrapper looks at values) naming the op, the argument, what was got and what was
wanted.
"""

import math

import torch
from torch import Tensor

from . import _registrations  # noqa: F401  (fakes, autograd, autocast)

_ops = torch.ops.shiva
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _has_values(tensor: Tensor) -> bool:
    """Whether looking at values costs no synchronisation and breaks no trace: a plain CPU tensor."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu" and tensor.dtype in _FLOATS
    return plain and not torch.compiler.is_compiling()


def topk_select(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Split every row into its ``k`` best tokens and the rest. Not differentiable.

    Larger scores first; equal scores keep the smaller index; -0 equals +0; NaN counts as largest, as in torch.topk.

    Args:
        scores: [B,N].
        k: 0 <= k <= N.

    Returns:
        kept [B,k] and rejected [B,N-k], int64, both ascending.
    """
    return _ops.topk_select(scores, k)


def soft_rank(scores: Tensor, tau: float) -> Tensor:
    """Differentiable descending rank, ``1 + sum_{j != i} sigmoid((s_j - s_i) / tau)``; 1 is best.

    Shiva-DiT (arXiv 2602.05605), eq. 5. Memory is O(N) a row, forward and backward.

    Args:
        scores: [B,N], finite.
        tau: temperature in units of the scores, > 0.

    Returns:
        [B,N] float32 (float64 for float64 scores).

    Raises:
        ValueError: tau is not a positive finite number, or (on the CPU, outside tracing) a score is NaN or infinite.
    """
    if not 0 < tau < math.inf:
        raise ValueError(f"soft_rank: tau is {tau}, wanted a positive finite temperature")
    if _has_values(scores) and not torch.isfinite(scores).all():
        count = int((~torch.isfinite(scores)).sum())
        raise ValueError(
            f"soft_rank: scores holds {count} NaN or infinite values of {scores.numel()}, wanted finite scores; "
            "look at the router's inputs (torch.ops.shiva.soft_rank does not check)"
        )
    return _ops.soft_rank(scores, tau)


def token_gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` [B,k] of ``x`` [B,N,D], or of one table [N,D] shared by the batch (RoPE). Returns [B,k,D]."""
    return _ops.token_gather(x, index)


def token_scatter(base: Tensor, index: Tensor, src: Tensor) -> Tensor:
    """A copy of ``base`` [B,N,D] with the rows ``index`` [B,k] replaced by ``src`` [B,k,D]."""
    return _ops.token_scatter(base, index, src)


def token_scatter_(base: Tensor, index: Tensor, src: Tensor) -> Tensor:
    """:func:`token_scatter` in place, for inference. Returns ``base``; a view is written through.

    Raises:
        RuntimeError: gradients are on and an argument requires one (use :func:`token_scatter`), or rows of base share
            memory.
    """
    if torch.is_grad_enabled() and (base.requires_grad or src.requires_grad):
        raise RuntimeError(
            "shiva::token_scatter_: an argument requires a gradient, but the in-place form has none; "
            "use token_scatter, or call it under torch.no_grad()"
        )
    _ops.token_scatter_(base, index, src)
    if not torch.compiler.is_compiling() and not base.is_inference():
        torch.autograd.graph.increment_version(base)  # the stable ABI does not do it
    return base


def residual_gate(x: Tensor, inclusion: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Gather the kept tokens and give ``inclusion`` the residual straight-through gradient.

    Shiva-DiT (arXiv 2602.05605), eq. 7 and 23. Backward, in one pass over x: the gradient of x is
    ``grad_base + scatter(grad_selected)``; that of inclusion is ``<grad_selected_i, x_i>`` for a kept token and
    ``-<grad_base_i, x_i>`` for a rejected one.

    Args:
        x: [B,N,D].
        inclusion: [B,N] float32 (float64 for float64 x); its values do not enter the forward.
        kept: [B,k].

    Returns:
        selected [B,k,D], the rows kept, and base [B,N,D], a copy of x.
    """
    return _ops.residual_gate(x, inclusion, kept)


def counterfactual_scatter(
    base: Tensor, kept: Tensor, src: Tensor, inclusion: Tensor, update: Tensor, kappa: float
) -> Tensor:
    """:func:`token_scatter` that gives ``inclusion`` the counterfactual gradient (docs/method.md).

    With g the gradient of the result, that of inclusion is ``<g_i, src_i - base_i> - kappa |update_i|^2`` for a kept
    token and ``<g_i, update_i> + kappa |update_i|^2`` for a rejected one.

    Args:
        base: [B,N,D], tokens at the block's entry.
        kept: [B,k].
        src: [B,k,D], the processed tokens.
        inclusion: [B,N] float32 (float64 for float64 base); its values do not enter the forward.
        update: [B,N,D], the dense teacher's update of the block; gets no gradient.
        kappa: half the curvature of the loss along an update, >= 0.

    Returns:
        [B,N,D].
    """
    return _ops.counterfactual_scatter(base, kept, src, inclusion, update, kappa)


def router_score(
    x: Tensor, context: Tensor, w_in: Tensor, ln_weight: Tensor, ln_bias: Tensor, w_out: Tensor, eps: float
) -> Tensor:
    """``<LayerNorm(SiLU(x w_in^T + context)), w_out>`` for every token.

    Shiva-DiT (arXiv 2602.05605), eq. 9.

    Args:
        x: [B,N,D].
        context: [B,H]; the context embedding plus the input bias.
        w_in: [H,D] in x's dtype.
        ln_weight, ln_bias, w_out: [H]; these and context may be float32 whatever x is.
        eps: of the LayerNorm over H.

    Returns:
        [B,N] float32 (float64 for float64 x).

    Where a gradient is wanted on the CPU, ``x w_in^T`` [B,N,H] is kept for it: H / D of x's memory for about a third
    of the backward's time. That form is the op ``router_score_and_projection``.
    """
    arguments = (x, context, w_in, ln_weight, ln_bias, w_out, eps)
    if torch.is_grad_enabled() and any(torch.is_tensor(t) and t.requires_grad for t in arguments):
        return _ops.router_score_and_projection(*arguments)[0]
    return _ops.router_score(*arguments)


def gather_modulate(x: Tensor, index: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """``LayerNorm(x[index]) * (1 + scale) + shift`` in one pass, the LayerNorm without weights.

    Args:
        x: [B,N,D].
        index: [B,k].
        shift, scale: [B,D].
        eps: of the LayerNorm over D.

    Returns:
        [B,k,D].
    """
    return _ops.gather_modulate(x, index, shift, scale, eps)


def scatter_residual(base: Tensor, index: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """A copy of ``base`` [B,N,D] with rows ``index`` [B,k] ``+= gate`` [B,D] ``* update`` [B,k,D], in one pass."""
    return _ops.scatter_residual(base, index, update, gate)


def scatter_mean(x: Tensor, position: Tensor, num_groups: int) -> Tensor:
    """The mean of each group's tokens, taken in token order; zeros for a group without any.

    Args:
        x: [B,N,D].
        position: [B,N], the group of each token, in [0, num_groups); here values may repeat.
        num_groups: M.

    Returns:
        [B,M,D].
    """
    return _ops.scatter_mean(x, position, num_groups)


def facility_location(similarity: Tensor, count: int) -> Tensor:
    """Greedy choice of the tokens D that stand for all: maximises sum_i max_{j in D} S_ij. Not differentiable.

    Each step takes the column that gains most, ``sum_i max(S_ij - max_{d in D} S_id, 0)``, at first over -1. Gains are
    computed in float64; equal gains take the smaller index; a NaN counts as the largest gain.

    Args:
        similarity: S, [B,n,n].
        count: size of D, 0 <= count <= n.

    Returns:
        int64 [B,count], ascending.
    """
    return _ops.facility_location(similarity, count)


def expert_dispatch(
    x: Tensor, experts: Tensor, num_experts: int, capacity: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """A copy of every token for each expert that it goes to, sorted by expert; within one, by token, then choice.

    Args:
        x: [T,D].
        experts: [T,K], in [0, num_experts), the choices of each token; here values may repeat.
        num_experts: E, from 1 to 1,024.
        capacity: rows of each expert; its later choices are dropped, its spare rows are zero. None: as many as there
            are, and no choice is dropped.

    Returns:
        rows [R,D]: R = T K, or E times capacity.
        place int64 [T,K]: the row of each choice, as :func:`expert_combine` takes it; -1 for a dropped one.
        ends int32 [E]: how many choices go to the experts up to this one, dropped ones too. Without a capacity the end
        of each expert's rows, as ``torch.nn.functional.grouped_mm`` takes it.
    """
    if capacity is not None and capacity < 1:
        raise ValueError(f"expert_dispatch: capacity must be at least 1, or None for no limit, got {capacity}")
    return _ops.expert_dispatch(x, experts, num_experts, capacity or 0)


def expert_combine(rows: Tensor, place: Tensor, weight: Tensor) -> Tensor:
    """Each token's weighted sum of its rows, in the order of its choices: the way back from :func:`expert_dispatch`.

    Args:
        rows: [R,D].
        place: [T,K], the row of each choice, or -1 for one that adds nothing. No row twice: the CPU's backward refuses
            it, on a GPU one of the two gets a wrong gradient.
        weight: [T,K], in the dtype of rows or the one that sums are taken in.

    Returns:
        [T,D].
    """
    return _ops.expert_combine(rows, place, weight)


def ema_scan(x: Tensor, p: Tensor) -> Tensor:
    """The moving average ``e_m = p_m x_m + (1 - p_m) e_{m-1}`` along the rows, from e = 0.

    Where p is 1 it starts afresh, and nothing of what was before comes through, not even a NaN: several sequences can
    stand in one row.

    Args:
        x: [B,M,D].
        p: [B,M], in the dtype of x or the one that sums are taken in. Not looked at: meant are 0 to 1.

    Returns:
        [B,M,D].
    """
    return _ops.ema_scan(x, p)
