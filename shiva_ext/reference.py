"""The specification of every op in :mod:`shiva_ext.ops`, in plain PyTorch.

Names and arguments are those of the native ops, so either module can stand in for the other. Here clarity wins over
speed and memory: :func:`soft_rank` builds the N x N matrix that the native kernel avoids. Arguments are not checked.

Letters in the shapes: B rows of the batch, N tokens, D channels, k kept tokens, H the router's hidden width. For
experts: T tokens of the whole batch, K experts a token, E experts, R rows.

dtypes: float32, bfloat16, float16 and float64. Half precisions are computed in float32 and cast back once, float64
stays float64. Indices are int64 or int32, in range and unique within a row.

Gradients: ordinary autograd wherever the op has a natural gradient. :func:`residual_gate` and
:func:`counterfactual_scatter` *prescribe* the gradient of ``inclusion``, which their outputs do not depend on; it is
spelled out in the ``*_backward`` functions beside them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "counterfactual_scatter",
    "counterfactual_scatter_backward",
    "ema_scan",
    "expert_combine",
    "expert_dispatch",
    "facility_location",
    "gather_modulate",
    "residual_gate",
    "residual_gate_backward",
    "router_score",
    "scatter_mean",
    "scatter_residual",
    "soft_rank",
    "soft_rank_backward",
    "token_gather",
    "token_scatter",
    "token_scatter_",
    "topk_select",
]


def _wide(x: Tensor) -> Tensor:
    """x in the dtype that arithmetic is done in: float64 for float64, else float32."""
    return x if x.dtype == torch.float64 else x.float()


def _rows(index: Tensor, D: int) -> Tensor:
    """index [B,k] as the int64 [B,k,D] that torch.gather and torch.scatter want along the token axis."""
    return index.long().unsqueeze(-1).expand(-1, -1, D)


def topk_select(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Split the tokens of each row into the k with the largest scores and the rest.

    A larger score comes first; among equal scores the smaller index is kept; -0 equals +0; NaN counts as largest, as in
    torch.topk. Not differentiable.

    Args:
        scores: [B,N].
        k: number of kept tokens, 0 <= k <= N.

    Returns:
        kept [B,k] and rejected [B,N-k], int64, both ascending.
    """
    # Adding +0 turns -0 into +0, so that the two tie whatever the sort compares.
    order = torch.argsort(scores.detach() + 0.0, dim=-1, descending=True, stable=True)
    return order[:, :k].sort(dim=-1).values, order[:, k:].sort(dim=-1).values


def soft_rank(scores: Tensor, tau: float) -> Tensor:
    """Descending soft rank: ``1 + sum over j != i of sigmoid((s_j - s_i) / tau)``. Rank 1 is the best token.

    Shiva-DiT (arXiv 2602.05605), eq. 5. Non-finite scores follow the formula: a NaN makes every rank of its row NaN
    when N >= 2, two equal infinities make each other's rank NaN, any other infinity is ranked as a limit.

    Args:
        scores: [B,N].
        tau: temperature in units of the scores, > 0. As tau -> 0 the ranks become the integers 1..N.

    Returns:
        [B,N], float32 (float64 for float64 scores).
    """
    s = _wide(scores)
    N = s.shape[-1]
    difference = (s.unsqueeze(-2) - s.unsqueeze(-1)) / tau  # [B,i,j]: s_j - s_i
    itself = torch.eye(N, dtype=torch.bool, device=s.device)
    return 1 + torch.sigmoid(difference.masked_fill(itself, -torch.inf)).sum(dim=-1)


def soft_rank_backward(grad: Tensor, scores: Tensor, tau: float) -> Tensor:
    """Gradient of :func:`soft_rank` in closed form.

    ``grad_m = (1/tau) * sum over j != m of sigmoid'((s_j - s_m) / tau) * (g_j - g_m)``. The weights are symmetric in j
    and m, so one pass over the pairs is enough and only the scores need to be saved.

    Args:
        grad: [B,N], gradient of the ranks, float32 (float64 for float64 scores).
        scores: [B,N].
        tau: temperature, > 0.

    Returns:
        [B,N] in the dtype of scores.
    """
    s, g = _wide(scores), _wide(grad)
    N = s.shape[-1]
    itself = torch.eye(N, dtype=torch.bool, device=s.device)
    sigmoid = torch.sigmoid(((s.unsqueeze(-2) - s.unsqueeze(-1)) / tau).masked_fill(itself, -torch.inf))  # [B,m,j]
    pairs = sigmoid * (1 - sigmoid) * (g.unsqueeze(-2) - g.unsqueeze(-1))
    return (pairs.sum(dim=-1) / tau).to(scores.dtype)


def token_gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x at index. Backward: the gradient rows scattered into zeros.

    Args:
        x: [B,N,D], or [N,D] shared by all rows of the batch (position tables); its gradient is then summed over B.
        index: [B,k].

    Returns:
        [B,k,D] in the dtype of x.
    """
    B, D = index.shape[0], x.shape[-1]
    if x.dim() == 2:
        x = x.expand(B, -1, -1)
    return x.gather(1, _rows(index, D))


def token_scatter(base: Tensor, index: Tensor, src: Tensor) -> Tensor:
    """A copy of base whose rows at index are replaced by src.

    Backward: the gradient of base is zero at index, the gradient of src is gathered there.

    Args:
        base: [B,N,D].
        index: [B,k].
        src: [B,k,D], in the dtype of base.

    Returns:
        [B,N,D].
    """
    return base.scatter(1, _rows(index, base.shape[-1]), src)


def token_scatter_(base: Tensor, index: Tensor, src: Tensor) -> Tensor:
    """:func:`token_scatter` in place, for inference. Returns base."""
    return base.scatter_(1, _rows(index, base.shape[-1]), src)


def residual_gate_backward(grad_selected: Tensor, grad_base: Tensor, x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The residual straight-through estimator, Shiva-DiT (arXiv 2602.05605), eq. 7 and 23.

    ``grad_x = grad_base + scatter(grad_selected)``; ``grad_inclusion_i`` is ``<grad_selected_i, x_i>`` for a kept token
    (the gradient at the block's input) and ``-<grad_base_i, x_i>`` for a rejected one (the gradient on the identity
    path).

    Args:
        grad_selected: [B,k,D].
        grad_base: [B,N,D].
        x: [B,N,D].
        kept: [B,k].

    Returns:
        grad_x [B,N,D] in the dtype of x, and grad_inclusion [B,N] in float32 (float64 for float64 x).
    """
    rows = _rows(kept, x.shape[-1])
    grad_selected, grad_base = _wide(grad_selected), _wide(grad_base)
    grad_x = grad_base.scatter_add(1, rows, grad_selected).to(x.dtype)
    seen = (-grad_base).scatter(1, rows, grad_selected)
    return grad_x, (seen * _wide(x)).sum(dim=-1)


class _ResidualGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, inclusion, kept):
        ctx.save_for_backward(x, kept)
        return token_gather(x, kept), x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_selected, grad_base):
        x, kept = ctx.saved_tensors
        grad_x, grad_inclusion = residual_gate_backward(grad_selected, grad_base, x, kept)
        return grad_x, grad_inclusion, None


def residual_gate(x: Tensor, inclusion: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Split x into the tokens that a block will process and the identity path, and send a gradient to ``inclusion``.

    The values do not depend on inclusion; the gradient is :func:`residual_gate_backward`.

    Args:
        x: [B,N,D], tokens at the block's entry.
        inclusion: [B,N], the probability that each token is kept; float32 (float64 for float64 x).
        kept: [B,k].

    Returns:
        selected [B,k,D], the rows of x at kept, and base [B,N,D], a copy of x.
    """
    return _ResidualGate.apply(x, inclusion, kept)


def counterfactual_scatter_backward(
    grad: Tensor, base: Tensor, kept: Tensor, src: Tensor, update: Tensor, kappa: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The counterfactual estimator: how the loss changes when a token is processed instead of skipped.

    With g the gradient of the output, ``grad_inclusion_i`` is ``<g_i, src_i - base_i> - kappa * |update_i|^2`` for a
    kept token and ``<g_i, update_i> + kappa * |update_i|^2`` for a rejected one. ``grad_base`` is g with zeros at kept,
    ``grad_src`` is g gathered at kept.

    Args:
        grad: [B,N,D].
        base: [B,N,D].
        kept: [B,k].
        src: [B,k,D].
        update: [B,N,D], what the dense teacher's block adds to each token.
        kappa: curvature of the loss, per squared unit of update.

    Returns:
        grad_base [B,N,D] and grad_src [B,k,D] in the dtype of base, grad_inclusion [B,N] in float32 (float64 for
        float64 base).
    """
    rows = _rows(kept, base.shape[-1])
    is_kept = torch.zeros(base.shape[:2], dtype=torch.bool, device=base.device).scatter(1, kept.long(), True)
    g, u = _wide(grad), _wide(update)
    step = u.scatter(1, rows, _wide(src) - _wide(base).gather(1, rows))
    curvature = kappa * u.square().sum(dim=-1)
    grad_inclusion = (g * step).sum(dim=-1) + torch.where(is_kept, -curvature, curvature)
    return grad.scatter(1, rows, 0), grad.gather(1, rows), grad_inclusion


class _CounterfactualScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, base, kept, src, inclusion, update, kappa):
        ctx.save_for_backward(base, kept, src, update)
        ctx.kappa = kappa
        return token_scatter(base, kept, src)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        base, kept, src, update = ctx.saved_tensors
        grad_base, grad_src, grad_inclusion = counterfactual_scatter_backward(grad, base, kept, src, update, ctx.kappa)
        return grad_base, None, grad_src, grad_inclusion, None, None


def counterfactual_scatter(
    base: Tensor, kept: Tensor, src: Tensor, inclusion: Tensor, update: Tensor, kappa: float
) -> Tensor:
    """:func:`token_scatter` that sends a gradient to ``inclusion``: :func:`counterfactual_scatter_backward`.

    Args:
        base: [B,N,D], tokens at the block's entry.
        kept: [B,k].
        src: [B,k,D], the block's output for the kept tokens.
        inclusion: [B,N], the probability that each token is kept; float32 (float64 for float64 base).
        update: [B,N,D], what the dense teacher's block adds to each token; a constant, it gets no gradient.
        kappa: curvature of the loss, per squared unit of update.

    Returns:
        [B,N,D].
    """
    return _CounterfactualScatter.apply(base, kept, src, inclusion, update, kappa)


def router_score(
    x: Tensor, context: Tensor, w_in: Tensor, ln_weight: Tensor, ln_bias: Tensor, w_out: Tensor, eps: float
) -> Tensor:
    """The router's score of every token: ``w_out . LayerNorm(SiLU(w_in x + context))``.

    Shiva-DiT (arXiv 2602.05605), eq. 9.

    Args:
        x: [B,N,D].
        context: [B,H], the projected timestep, prompt and layer embeddings plus the input projection's bias.
        w_in: [H,D], in the dtype of x.
        ln_weight, ln_bias, w_out: [H]; like context in the dtype of x or float32.
        eps: of the LayerNorm over H.

    Returns:
        [B,N], float32 (float64 for float64 x).
    """
    hidden = F.silu(F.linear(_wide(x), _wide(w_in)) + _wide(context).unsqueeze(1))
    return F.layer_norm(hidden, hidden.shape[-1:], _wide(ln_weight), _wide(ln_bias), eps) @ _wide(w_out)


def gather_modulate(x: Tensor, index: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """The entry of an adaptive-norm block: ``LayerNorm(gather(x, index)) * (1 + scale) + shift``.

    The LayerNorm is over D and has no affine part of its own.

    Args:
        x: [B,N,D].
        index: [B,k].
        shift, scale: [B,D], in the dtype of x.
        eps: of the LayerNorm.

    Returns:
        [B,k,D] in the dtype of x.
    """
    rows = _wide(token_gather(x, index))
    normed = F.layer_norm(rows, rows.shape[-1:], eps=eps)
    return (normed * (1 + _wide(scale).unsqueeze(1)) + _wide(shift).unsqueeze(1)).to(x.dtype)


def scatter_residual(base: Tensor, index: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """The exit of an adaptive-norm block: a copy of base whose rows at index have ``gate * update`` added.

    Args:
        base: [B,N,D].
        index: [B,k].
        update: [B,k,D], in the dtype of base.
        gate: [B,D], in the dtype of base.

    Returns:
        [B,N,D].
    """
    rows = _wide(token_gather(base, index)) + _wide(gate).unsqueeze(1) * _wide(update)
    return token_scatter(base, index, rows.to(base.dtype))


def scatter_mean(x: Tensor, position: Tensor, num_groups: int) -> Tensor:
    """The mean of each group's tokens; zeros for a group without any.

    Args:
        x: [B,N,D].
        position: [B,N], the group of each token, in [0, num_groups); any number of tokens may share one.
        num_groups: M.

    Returns:
        [B,M,D] in the dtype of x.
    """
    B, _, D = x.shape
    wide = _wide(x)
    total = wide.new_zeros(B, num_groups, D).scatter_add(1, _rows(position, D), wide)
    count = wide.new_zeros(B, num_groups).scatter_add(1, position.long(), torch.ones_like(wide[..., 0]))
    return (total / count.clamp_min(1).unsqueeze(-1)).to(x.dtype)


def _sum_of_rows(x: Tensor) -> Tensor:
    """The sum over the rows of x [B,n,m], in the order that the native kernels keep.

    Row i is added to partial sum i % 32, and these are added up in halves: so that equal columns have equal sums
    everywhere.
    """
    n, half = x.shape[1], 16
    partial = F.pad(x, (0, 0, 0, -n % 32)).unflatten(1, (-1, 32)).cumsum(dim=1)[:, -1]
    while half:
        partial, half = partial[:, :half] + partial[:, half:], half // 2
    return partial[:, 0]


def facility_location(similarity: Tensor, count: int) -> Tensor:
    """Greedy choice of the tokens D that stand for all: maximises sum_i max_{j in D} S_ij.

    The first is the column of the largest sum over ``S + 1`` (no cosine is less than -1), each further one gains most:
    ``sum_i max(S_ij - max_{d in D} S_id, 0)``. For S >= 0 that is within 1 - 1/e of the best choice. Equal gains take
    the smaller index; a NaN counts as the largest gain. Gains are computed in float64. Not differentiable.

    Args:
        similarity: S, [B,n,n]: how well token j stands for token i.
        count: size of D, 0 <= count <= n.

    Returns:
        int64 [B,count], ascending.
    """
    S = similarity.detach().double()
    covered = torch.full_like(S[:, :, :1], -1.0)
    taken = S.new_zeros(S.shape[:2], dtype=torch.bool)
    chosen = [taken.new_empty((len(S), 0), dtype=torch.int64)]
    for _ in range(count):
        gain = _sum_of_rows((S - covered).relu())
        best = gain.masked_fill(taken, -1.0).argmax(dim=1, keepdim=True)
        chosen.append(best)
        taken = taken.scatter(1, best, True)
        covered = torch.maximum(covered, S.gather(2, best[:, None].expand(-1, S.shape[1], -1)))
    return torch.cat(chosen, dim=1).sort(dim=1).values


def expert_dispatch(x: Tensor, experts: Tensor, num_experts: int, capacity: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A copy of every token for each expert that it goes to, sorted by expert; within one, by token, then choice.

    Args:
        x: [T,D].
        experts: [T,K], in [0, num_experts), the choices of each token; two may be the same.
        num_experts: E, from 1 to 1,024.
        capacity: rows of each expert; its later choices are dropped, its spare rows zero. 0: as many as there are.

    Returns:
        rows [R,D]: R = T K, or E times capacity.
        place int64 [T,K]: the row of each choice; -1 for a dropped one.
        ends int32 [E]: how many choices go to the experts up to this one, dropped ones too. Without a capacity the end
        of each expert's rows, as ``torch.nn.functional.grouped_mm`` takes it.
    """
    K = experts.shape[1]
    expert = experts.reshape(-1).long()
    order = expert.argsort(stable=True)
    ends = torch.bincount(expert, minlength=num_experts).cumsum(0)
    rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    slot = rank - F.pad(ends, (1, -1))[expert]
    place = torch.where(slot < capacity, expert * capacity + slot, -1) if capacity else rank
    kept = place >= 0
    rows = x.new_zeros(num_experts * capacity if capacity else len(order), x.shape[1])
    rows = rows.index_put((place[kept],), x.repeat_interleave(K, dim=0)[kept])
    return rows, place.view(experts.shape), ends.int()


def expert_combine(rows: Tensor, place: Tensor, weight: Tensor) -> Tensor:
    """Each token's weighted sum of its rows: what undoes :func:`expert_dispatch`.

    Args:
        rows: [R,D].
        place: [T,K], the row of each choice, or -1 for one that adds nothing; no row twice.
        weight: [T,K], in the dtype of rows or the accumulation dtype.

    Returns:
        [T,D] in the dtype of rows.
    """
    padded = F.pad(_wide(rows), (0, 0, 0, 1))  # a row of zeros, which -1 takes
    each = weight.to(padded.dtype).unsqueeze(-1) * padded[place.long()]
    return torch.where(place.unsqueeze(-1) >= 0, each, 0).sum(dim=1).to(rows.dtype)


def ema_scan(x: Tensor, p: Tensor) -> Tensor:
    """The moving average ``e_m = p_m x_m + (1 - p_m) e_{m-1}`` along the rows, from e = 0.

    Where p is 1 it starts afresh, and nothing of what was before comes through, not even a NaN: several sequences can
    stand in one row.

    Args:
        x: [B,M,D].
        p: [B,M], in the dtype of x or the accumulation dtype.

    Returns:
        [B,M,D] in the dtype of x.
    """
    wide = _wide(x)
    p, state, found = p.to(wide.dtype), torch.zeros_like(wide[:, :0].sum(dim=1)), []
    for m in range(x.shape[1]):
        share = p[:, m, None]
        before = torch.where((share == 1) & ~state.isfinite(), 0, state)
        state = share * wide[:, m] + (1 - share) * before
        found.append(state)
    return (torch.stack(found, dim=1) if found else p.unsqueeze(-1) * wide).to(x.dtype)
