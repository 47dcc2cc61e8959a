"""Gradients through a hard choice of tokens: soft inclusion, and the estimators that wrap one pruned block."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shiva_ext import ops

TAU_RANK = (0.2, 0.02)
TAU_SEL = (0.1, 0.01)


def anneal(progress: float, start: float, end: float) -> float:
    """Cosine from ``start`` at progress 0 to ``end`` at progress 1; outside [0, 1] it stays at the nearer end."""
    progress = min(max(progress, 0.0), 1.0)
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def perturb(scores: Tensor, noise_fraction: float, generator: torch.Generator | None = None) -> Tensor:
    """Scores [B,N] plus Gaussian noise of standard deviation ``noise_fraction * std(scores)``, row by row.

    The noise is tied to the spread of the scores because the paper gives no scale and the router's is free to grow.
    """
    if noise_fraction == 0:
        return scores
    spread = scores.detach().std(dim=-1, correction=0, keepdim=True)
    if generator is None:
        noise = torch.randn_like(scores)  # a compiler takes this with shapes that change, and no generator
    else:
        noise = torch.randn(scores.shape, generator=generator, dtype=scores.dtype, device=scores.device)
    return scores + noise_fraction * spread * noise


def inclusion(
    scores: Tensor,
    k: Tensor | float,
    tau_rank: float,
    tau_sel: float,
    noise_fraction: float = 0.1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Soft probability that each token is among the k best; differentiable in the scores and in k.

    ``pi_i = sigmoid((k - rank_i) / (tau_sel * N))`` with the descending soft rank of the perturbed scores: Shiva-DiT
    (arXiv 2602.05605), eq. 5 and 30.

    Args:
        scores: [B,N].
        k: the continuous budget in tokens (N times the ratio, before the floor): a number, or a tensor without axes
            that may require a gradient.
        tau_rank: temperature of the rank, in units of the scores, > 0.
        tau_sel: temperature of the inclusion, as a share of N, > 0.
        noise_fraction: standard deviation of the noise on the scores, as a share of theirs; 0 for none.
        generator: of the noise.

    Returns:
        [B,N] float32 (float64 for float64 scores).
    """
    if tau_sel <= 0:
        raise ValueError(f"inclusion: tau_sel is {tau_sel}, wanted a temperature above 0")
    if isinstance(k, Tensor) and k.ndim:
        raise ValueError(f"inclusion: k has shape {tuple(k.shape)}, wanted a number or a tensor without axes")
    ranks = ops.soft_rank(perturb(scores, noise_fraction, generator), tau_rank)
    return torch.sigmoid((k - ranks) / (tau_sel * scores.shape[-1]))


class Estimator(ABC):
    """Runs one block on the k best tokens and sends the router and the budget a gradient.

    Attributes:
        tau_rank, tau_sel: (start, end) of the annealed temperatures; see :func:`inclusion`.
        noise_fraction: see :func:`perturb`. One draw serves the choice and the ranks, so that the choice stays the hard
            limit of the inclusion.
        progress: share of the training that is done, from 0 to 1; the trainer advances it.
        generator: of the noise; None is torch's global one.
        needs_update: whether :meth:`apply` wants the dense teacher's block update.
    """

    needs_update = False

    def __init__(
        self,
        tau_rank: tuple[float, float] = TAU_RANK,
        tau_sel: tuple[float, float] = TAU_SEL,
        noise_fraction: float = 0.1,
        generator: torch.Generator | None = None,
    ):
        self.tau_rank, self.tau_sel, self.noise_fraction = tau_rank, tau_sel, noise_fraction
        self.generator = generator
        self.progress = 0.0

    def apply(
        self,
        block_fn: Callable[..., Tensor],
        x: Tensor,
        scores: Tensor,
        k_cont: Tensor | float,
        k_int: int,
        update: Tensor | None = None,
        with_index: bool = False,
        noisy: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Process the ``k_int`` best tokens, pass the others through.

        Args:
            block_fn: maps the gathered tokens [B,k,D] to processed tokens [B,k,D]; may close over other streams.
            x: [B,N,D], tokens at the block's entry.
            scores: [B,N], the router's.
            k_cont: the budget before the floor, see :func:`inclusion`.
            k_int: tokens that are processed, 0 <= k_int <= N; estimators that train on all say so.
            update: [B,N,D], the dense teacher's ``block(h) - h``; for estimators with ``needs_update``.
            noisy: whether to perturb the scores here; False if they already are.
            with_index: call ``block_fn(tokens, kept)``, for blocks that must know which tokens they get.

        Returns:
            y [B,N,D] in the dtype of x, and kept [B,k] int64, ascending.

        Raises:
            ValueError: update is missing or has the wrong shape.
        """
        if self.needs_update and (update is None or update.shape != x.shape):
            got = None if update is None else tuple(update.shape)
            raise ValueError(
                f"{type(self).__name__}: update is {got}, wanted the dense teacher's block update of shape "
                f"{tuple(x.shape)}: run the teacher, or choose estimator='residual'"
            )
        if noisy:
            scores = self.perturb(scores)
        pi = self.inclusion(scores, k_cont, k_int)
        kept, rejected = self.choose(scores, k_int)
        block = (lambda tokens: block_fn(tokens, kept)) if with_index else block_fn
        return self._run(block, x, pi, kept, rejected, update), kept

    def perturb(self, scores: Tensor) -> Tensor:
        """The scores [B,N] that a training step chooses by: with noise, for exploration."""
        return perturb(scores, self.noise_fraction, self.generator)

    def inclusion(self, keys: Tensor, k: Tensor | float, k_int: int) -> Tensor:
        """What the choice of ``k_int`` tokens by perturbed scores [B,N] is relaxed to, differentiable in them and k."""
        tau_rank, tau_sel = anneal(self.progress, *self.tau_rank), anneal(self.progress, *self.tau_sel)
        return inclusion(keys, k, tau_rank, tau_sel, noise_fraction=0)

    def choose(self, keys: Tensor, k_int: int) -> tuple[Tensor, Tensor]:
        """The tokens that are processed and those that are not, see :func:`shiva_ext.ops.topk_select`."""
        return ops.topk_select(keys.detach(), k_int)

    @abstractmethod
    def _run(self, block_fn, x, pi, kept, rejected, update) -> Tensor:
        """The block's output [B,N,D], with its gradient to pi [B,N]."""


class ResidualEstimator(Estimator):
    """The residual straight-through estimator, Shiva-DiT (arXiv 2602.05605), eq. 7 and 23.

    Args:
        flipped: turn the sign of the gradient on the inclusion. The published sign rewards tokens whose growth raises
            the loss; see docs/method.md.
        **options: see :class:`Estimator`.
    """

    def __init__(self, flipped: bool = False, **options):
        super().__init__(**options)
        self.flipped = flipped

    def _run(self, block_fn, x, pi, kept, rejected, update):
        if self.flipped:
            pi = 2 * pi.detach() - pi  # the same value, the opposite derivative
        selected, base = ops.residual_gate(x, pi, kept)
        return ops.token_scatter(base, kept, block_fn(selected).to(x.dtype))


class _SelfCalibratedScatter(torch.autograd.Function):
    """``counterfactual_scatter`` whose kappa is read off the gradient in the backward pass."""

    @staticmethod
    def forward(ctx, base, kept, rejected, src, inclusion, update):
        ctx.save_for_backward(base, kept, rejected, src, update)
        return ops.token_scatter(base, kept, src)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        base, kept, rejected, src, update = ctx.saved_tensors
        grad_base, grad_src, first_order = torch.ops.shiva.counterfactual_scatter_backward(
            grad.contiguous(), base, kept, src, update, 0.0
        )
        wide = torch.promote_types(update.dtype, torch.float32)
        square = torch.linalg.vecdot(update.to(wide), update.to(wide))  # [B,N]
        curvature = -first_order.gather(1, rejected).sum() / square.gather(1, rejected).sum()
        # 0/0, where nothing is rejected or nothing would be updated, says nothing about curvature.
        kappa = torch.nan_to_num(curvature / 2, nan=0.0, posinf=0.0).clamp_min(0)
        sign = torch.ones_like(square).scatter_(1, kept, -1)
        return grad_base, None, None, grad_src, first_order + sign * kappa * square, None


class CounterfactualEstimator(Estimator):
    """How much the loss changes when a token is processed instead of skipped, to second order.

    With y the block's output, g = dL/dy and u the dense teacher's block update, the gradient on the inclusion is
    ``<g_i, y_i - x_i> - kappa |u_i|^2`` for a kept token and ``<g_i, u_i> + kappa |u_i|^2`` for a rejected one.

    kappa is half the loss's curvature along an update. Distillation puts the minimum of the loss where the token is
    processed: near it L(x + a u) = h/2 (a - 1)^2 |u|^2, so a rejected token sees g = -h u and <g, u> = -h |u|^2.
    ``kappa="auto"`` therefore takes, in every backward pass, ``1/2 max(0, -sum <g_i, u_i> / sum |u_i|^2)`` over the
    rejected tokens of the call: it has the loss's own scale, and there is nothing to tune.

    Args:
        kappa: "auto", or a number in units of the loss per squared unit of the tokens.
        **options: see :class:`Estimator`.
    """

    needs_update = True

    def __init__(self, kappa: float | str = "auto", **options):
        super().__init__(**options)
        if isinstance(kappa, str) and kappa != "auto":
            raise ValueError(f"CounterfactualEstimator: kappa is {kappa!r}, wanted 'auto' or a number")
        self.kappa = kappa

    def _run(self, block_fn, x, pi, kept, rejected, update):
        src = block_fn(ops.token_gather(x, kept)).to(x.dtype)
        update = update.detach().to(x.dtype)
        if self.kappa == "auto":
            return _SelfCalibratedScatter.apply(x, kept, rejected, src, pi, update)
        return ops.counterfactual_scatter(x, kept, src, pi, update, float(self.kappa))
