"""Tokens to concepts and back (ConceptMoE, arXiv 2601.21420)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from shiva_ext import ops

REDUCTIONS = ("sum", "last", "first")


@dataclass
class Chunks:
    """How a batch of sequences was cut.

    Attributes:
        probability: p [B,N], of a boundary at each token; 1 at the first.
        boundary: b bool [B,N]; the first token always is one.
        position: int64 [B,M], the token that opens each concept; then, where a sample has fewer, tokens that open none.
        concept: int64 [B,N], the concept that each token may look at: the latest that is made of tokens up to it alone,
            or -1 before there is one.
        loss: scalar, how far the share of boundaries is from 1 / R.
    """

    probability: Tensor
    boundary: Tensor
    position: Tensor
    concept: Tensor
    loss: Tensor

    def counts(self) -> Tensor:
        """int64 [B], concepts of each sample."""
        return self.boundary.sum(dim=1)

    def pack(self, concepts: Tensor) -> tuple[Tensor, Tensor]:
        """All samples' concepts one after another, without padding, for attention over sequences of unequal length.

        Args:
            concepts: [B,M,D].

        Returns:
            [1,T,D], and where each sample begins and the last one ends, int32 [B+1] (flash attention's ``cu_seqlens``).
        """
        ends = F.pad(self.counts().cumsum(dim=0), (1, 0)).to(torch.int32)
        return ops.token_gather(concepts.reshape(1, -1, concepts.shape[-1]), self._places()), ends

    def unpack(self, packed: Tensor) -> Tensor:
        """[1,T,D] as :meth:`pack` gives them -> [B,M,D], zeros where a sample has fewer."""
        B, M = self.position.shape
        empty = packed.new_zeros(1, B * M, packed.shape[-1])
        return ops.token_scatter(empty, self._places(), packed).view(B, M, -1)

    def _places(self) -> Tensor:
        """int64 [1,T], the concepts that are no padding, in all B * M."""
        order = torch.arange(self.position.shape[1], device=self.position.device)
        return (order < self.counts()[:, None]).flatten().nonzero().view(1, -1)


def ratio_loss(boundary: Tensor, probability: Tensor, ratio: float) -> Tensor:
    """``R F G + R / (R - 1) (1 - F)(1 - G)`` with F the mean of b and G that of p: 1 at F = G = 1 / R, its least.

    Over all tokens together; the gradient goes through G alone.
    """
    share, mean = boundary.detach().to(probability.dtype).mean(), probability.mean()
    return ratio * share * mean + ratio / (ratio - 1) * (1 - share) * (1 - mean)


def sharpen(probability: Tensor, tau: float) -> Tensor:
    """``p^(1/tau)`` from .5 on, ``1 - (1 - p)^(1/tau)`` below: what boundaries are drawn by in training."""
    return torch.where(probability >= 0.5, probability ** (1 / tau), 1 - (1 - probability) ** (1 / tau))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _first(chosen: Tensor, count: int) -> Tensor:
    """int64 [B,count]: where bool [B,N] is true, ascending, then the other places: every one once, as ``token_gather``
    wants it for its gradient."""
    return (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :count].contiguous()


def _sums(x: Tensor, group: Tensor, count: int) -> Tensor:
    """Sums [B,count,D] of the tokens x [B,N,D] of each group, in token order."""
    sizes = torch.zeros(len(x), count, dtype=torch.int64, device=x.device)
    sizes.scatter_add_(1, group, torch.ones_like(group))
    return (ops.scatter_mean(_wide(x), group, count) * sizes.unsqueeze(-1)).to(x.dtype)


class _Spread(torch.autograd.Function):
    """``token_gather`` whose places may repeat: gradients of the tokens that share one are added up, in token order."""

    @staticmethod
    def forward(ctx, x: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.count = x.shape[1]
        return ops.token_gather(x, place)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _sums(grad, ctx.saved_tensors[0], ctx.count), None


class Chunk(nn.Module):
    """Cut sequences where a token's query is unlike the key of the one before it.

    ``p_n = (1 - cos(q_n, k_(n-1))) / 2``, a boundary where it is at least .5.

    Args:
        dim: D.
        ratio: R, tokens a concept; above 1.
        reduction: what a concept is made of: the "sum" of its tokens, the "last" one, or the "first", its boundary.
        tau: sharpness of the noise on boundaries in training; None for none.
        fixed: cut every ``ratio`` tokens instead, for comparison.
    """

    def __init__(
        self, dim: int, ratio: float = 2.0, reduction: str = "sum", tau: float | None = 6.0, fixed: bool = False
    ):
        super().__init__()
        if not 1 < ratio < float("inf"):
            raise ValueError(f"ratio, tokens a concept, must be above 1, got {ratio}")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
        if tau is not None and not tau >= 1:
            raise ValueError(f"tau must be at least 1, or None, got {tau}")
        self.ratio, self.reduction, self.tau, self.fixed = ratio, reduction, tau, fixed
        if not fixed:
            self.query = nn.Linear(dim, dim, bias=False)
            self.key = nn.Linear(dim, dim, bias=False)

    def forward(
        self, hidden: Tensor, generator: torch.Generator | None = None, valid: Tensor | None = None
    ) -> tuple[Tensor, Chunks]:
        """hidden [B,N,D] -> concepts [B,M,D], right-padded to the longest sample's M, and how they were cut.

        Padding comes last, so that a causal model needs no mask for it.

        Args:
            hidden: [B,N,D].
            generator: of the noise on boundaries.
            valid: bool [B,N], False for padding at a sample's end, which opens no concepts and counts in no loss. What
                comes back for it means nothing.

        Raises:
            ValueError: there are no tokens, or ``valid`` does not fit or hides a sample's first token.
        """
        if hidden.ndim != 3 or not hidden.shape[0] or not hidden.shape[1]:
            raise ValueError(f"Chunk: hidden has shape {tuple(hidden.shape)}, wanted [B,N,D] with a token at least")
        probability = self.probability(hidden)
        boundary = self._boundary(probability, generator)
        if valid is not None:
            if valid.shape != boundary.shape or valid.dtype != torch.bool or not valid[:, 0].all():
                raise ValueError(
                    f"Chunk: valid is {valid.dtype} {tuple(valid.shape)}, wanted bool {tuple(boundary.shape)}, True at "
                    "each sample's first token"
                )
            boundary = boundary & valid
        most = int(boundary.sum(dim=1).max())
        position = _first(boundary, most)
        number = boundary.long().cumsum(dim=1) - 1
        concepts = self._reduce(hidden, boundary, number, position)
        # The sum and the last token of a chunk are not known before it ends.
        concept = number if self.reduction == "first" else number - 1
        seen = (boundary, probability) if valid is None else (boundary[valid], probability[valid])
        loss = ratio_loss(*seen, self.ratio)
        return concepts, Chunks(probability, boundary, position, concept, loss)

    def probability(self, hidden: Tensor) -> Tensor:
        """p [B,N] of hidden [B,N,D], float32 (float64 of float64)."""
        if self.fixed:
            n = torch.arange(hidden.shape[1], device=hidden.device, dtype=torch.float64)
            cut = (n / self.ratio).floor() != ((n - 1) / self.ratio).floor()
            return _wide(cut.to(hidden.dtype)).expand(len(hidden), -1)
        likeness = F.cosine_similarity(self.query(hidden[:, 1:]), self.key(hidden[:, :-1]), dim=-1)
        return F.pad((1 - _wide(likeness)) / 2, (1, 0), value=1.0)

    def _boundary(self, probability: Tensor, generator: torch.Generator | None) -> Tensor:
        if self.training and self.tau is not None and not self.fixed:
            sharp = sharpen(probability.detach(), self.tau)
            drawn = torch.rand(sharp.shape, generator=generator, device=sharp.device) < sharp
            drawn[:, 0] = True
            return drawn
        return probability >= 0.5

    def _reduce(self, hidden: Tensor, boundary: Tensor, number: Tensor, position: Tensor) -> Tensor:
        most = position.shape[1]
        if self.reduction == "first":
            return ops.token_gather(hidden, position)
        if self.reduction == "last":
            return ops.token_gather(hidden, _first(F.pad(boundary[:, 1:], (0, 1), value=True), most))
        return _sums(hidden, number, most)


class Dechunk(nn.Module):
    """Concepts back to tokens: an average that moves on by p, and each token's latest concept.

    ``e_m = p_m c_m + (1 - p_m) e_(m-1)`` over the concepts, ``z_n = h_n + s_n e_(concept of n)`` with s a factor that
    is 1 and passes the gradient on to the probability that was chosen (p at a boundary, 1 - p elsewhere).
    """

    def forward(self, hidden: Tensor, concepts: Tensor, chunks: Chunks) -> tuple[Tensor, Tensor]:
        """hidden [B,N,D] and what the concept model made of the concepts [B,M,D] -> z [B,N,D], and c [B,N,D], each
        token's concept without the factor, for joint decoding."""
        p = _wide(chunks.probability.gather(1, chunks.position))
        p = torch.cat([torch.ones_like(p[:, :1]), p[:, 1:]], dim=1)
        averages = ops.ema_scan(concepts, p)
        known = chunks.concept >= 0
        mine = _Spread.apply(averages, chunks.concept.clamp_min(0))
        mine = torch.where(known.unsqueeze(-1), mine, 0)  # not times 0, which a NaN of a later token would survive
        chosen = torch.where(chunks.boundary, chunks.probability, 1 - chunks.probability)
        factor = 1 + (chosen - chosen.detach())  # exactly 1
        return hidden + factor.unsqueeze(-1).to(mine.dtype) * mine, mine
