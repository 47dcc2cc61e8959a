"""The ops under test, and how to make their arguments for any size, dtype, content and layout."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .device import DEVICE, place

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CONTENTS = ("random", "ties", "zeros", "nan", "inf", "equal")
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded")
SEEDS = (0, 1)
# Exact in binary, so that their rounding plays no part. At this temperature some pairs of every longer row saturate.
TAU, KAPPA, EPS = 0.0625, 0.375, 2.0**-20
# Experts a token, experts in all, rows of no choice.
CHOICES, EXPERTS, SPARE = 3, 5, 2


@dataclass(frozen=True)
class Size:
    """B rows, N tokens, k kept, D channels, H hidden units of the router."""

    B: int
    N: int
    k: int
    D: int
    H: int


SIZES = {
    "empty batch": Size(B=0, N=5, k=2, D=8, H=4),
    "one token": Size(B=2, N=1, k=1, D=1, H=1),
    "keep none": Size(B=2, N=9, k=0, D=17, H=8),
    "keep one": Size(B=2, N=33, k=1, D=16, H=17),
    "keep all": Size(B=2, N=16, k=16, D=3, H=5),
    "odd": Size(B=3, N=21, k=13, D=17, H=7),
    "typical": Size(B=2, N=75, k=45, D=64, H=32),
}
RARE_SIZES = {
    "no tokens": Size(B=2, N=0, k=0, D=4, H=4),
    "one token rejected": Size(B=2, N=1, k=0, D=3, H=3),
    "two tokens": Size(B=1, N=2, k=1, D=3, H=2),
    "many short rows": Size(B=65, N=4, k=3, D=8, H=8),
    "many channels": Size(B=1, N=3, k=2, D=1031, H=129),
}
TYPICAL = SIZES["typical"]
# Long enough that rows are shared out among threads and every vector loop runs its main body many times.
LARGE = Size(B=2, N=1030, k=615, D=72, H=64)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic is done in, and that scores, ranks and inclusions have."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def lay_out(t: Tensor, layout: str) -> Tensor:
    """The same values with other strides. Between the elements of a slice is poison: NaN, or an index out of range."""
    if layout == "transposed" and t.dim() > 1:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout in ("transposed", "sliced"):
        poison = float("nan") if t.is_floating_point() else 2**30
        view = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), poison)[..., 1::2]
        return view.copy_(t)
    return t


class Maker:
    """Tensors of one case. Values depend on all but layout and device, save that an expanded one repeats a row."""

    def __init__(
        self,
        size: Size,
        dtype: torch.dtype,
        content="random",
        layout="contiguous",
        seed=0,
        index=torch.int64,
        device=DEVICE,
    ):
        self.size, self.dtype, self.content, self.layout, self.index_dtype = size, dtype, content, layout, index
        self.device = device
        self.B, self.N, self.k, self.D, self.H = size.B, size.N, size.k, size.D, size.H
        self.generator = torch.Generator().manual_seed(seed)

    def _values(self, shape: tuple[int, ...], content: str) -> Tensor:
        value = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        chance = torch.rand(shape, generator=self.generator)
        if content == "ties":
            return (value * 2).round() / 2
        if content == "zeros":
            return value.sign() * (chance < 0.2)
        if content == "nan":
            return value.masked_fill(chance < 0.05, float("nan"))
        if content == "inf":
            return torch.where(chance < 0.05, value.sign() * torch.inf, value)
        if content == "spread":  # most pairs of soft_rank saturate
            return value * 64
        if content == "equal":
            return torch.full(shape, 0.7, dtype=torch.float64)
        return value

    def _batch(self, t: Callable[[int], Tensor]) -> Tensor:
        if self.layout == "expanded":
            row = t(1)
            return place(row.expand(self.B, *row.shape[1:]), self.device)
        return self._shared(t(self.B))

    def _shared(self, t: Tensor) -> Tensor:
        return place(lay_out(t, self.layout), self.device)

    def floats(self, *shape: int, content: str | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """[B, *shape] with the case's content."""
        return self._batch(lambda B: self._values((B, *shape), content or self.content).to(dtype or self.dtype))

    def weight(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A random tensor that all rows of the batch share, of size about one in sum."""
        return self._shared((self._values(shape, "random") / max(shape[-1], 1) ** 0.5).to(dtype or self.dtype))

    def tokens(self) -> Tensor:
        return self.floats(self.N, self.D)

    def table(self) -> Tensor:
        return self._shared(self._values((self.N, self.D), self.content).to(self.dtype))

    def scores(self) -> Tensor:
        return self.floats(self.N)

    def index(self) -> Tensor:
        """[B,k], unique in each row, in no order."""

        def rows(B: int) -> Tensor:
            return torch.rand((B, self.N), generator=self.generator).argsort(dim=1)[:, : self.k].to(self.index_dtype)

        return self._batch(rows)

    def groups(self) -> Tensor:
        """[B,N], the group of each token, below num_groups."""
        M = self.num_groups

        def rows(B: int) -> Tensor:
            return (torch.rand((B, self.N), generator=self.generator) * M).long().to(self.index_dtype)

        return self._batch(rows)

    @property
    def num_groups(self) -> int:
        return max(self.k, 1)  # tokens must be in one

    # For experts all tokens of the batch are one list.

    @property
    def tokens_in_all(self) -> int:
        return self.B * self.N

    def list_of_tokens(self) -> Tensor:
        return self._shared(self._values((self.tokens_in_all, self.D), self.content).to(self.dtype))

    def experts(self) -> Tensor:
        """[T,CHOICES], each below EXPERTS; the last expert is hardly wanted, none of the first two if T is small."""
        chance = torch.rand((self.tokens_in_all, CHOICES), generator=self.generator)
        return self._shared((chance.sqrt() * (EXPERTS - 0.5)).long().to(self.index_dtype))

    def place(self) -> Tensor:
        """[T,CHOICES], rows of :meth:`expert_rows`, none twice, some -1."""
        shape = (self.tokens_in_all, CHOICES)
        row = torch.randperm(self.num_rows, generator=self.generator)[: self.num_rows - SPARE].view(shape)
        dropped = torch.rand(shape, generator=self.generator) < 0.2
        return self._shared(row.masked_fill(dropped, -1).to(self.index_dtype))

    @property
    def num_rows(self) -> int:
        return self.tokens_in_all * CHOICES + SPARE

    def expert_rows(self) -> Tensor:
        return self._shared(self._values((self.num_rows, self.D), self.content).to(self.dtype))

    def expert_weight(self) -> Tensor:
        values = self._values((self.tokens_in_all, CHOICES), "random").sigmoid()
        return self._shared(values.to(wide(self.dtype)))

    def inclusion(self) -> Tensor:
        return self._batch(lambda B: self._values((B, self.N), "random").sigmoid().to(wide(self.dtype)))

    def restarts(self) -> Tensor:
        """[B,N] in [0, 1], the ends among them."""

        def rows(B: int) -> Tensor:
            p = self._values((B, self.N), "random").sigmoid()
            chance = torch.rand((B, self.N), generator=self.generator)
            return p.masked_fill(chance < 0.1, 1.0).masked_fill(chance > 0.9, 0.0).to(wide(self.dtype))

        return self._batch(rows)

    def scale(self) -> Tensor:
        """[B,D], never infinite: what that does to a LayerNorm's gradient depends on the order of its terms."""
        return self.floats(self.D, content="random" if self.content == "inf" else None)

    def gradients(self, outputs: tuple[Tensor, ...], content: str) -> list[Tensor]:
        """One for each output that has a gradient; all rows of the batch share one without a batch."""

        def like(out: Tensor) -> Tensor:
            if len(out) == self.B:
                return self.floats(*out.shape[1:], content=content, dtype=out.dtype)
            return self._shared(self._values(tuple(out.shape), content).to(out.dtype))

        return [like(out) for out in outputs if out.is_floating_point()]


@dataclass(frozen=True)
class Op:
    """One op of ``torch.ops.shiva`` (and of ``shiva_ext.ops``, and of ``shiva_ext.reference``).

    Attributes:
        name: of the op.
        arguments: makes the arguments, in the order of the schema.
        leaves: names of the arguments that get a gradient.
        copies: the forward only moves values; their bits must not change, NaN payloads and the sign of zero included.
        copies_gradient: the same of the backward, up to the sign of zero.
        terms: how many numbers are added up, at most, into one element of an output or gradient; for the error bound.
        gradient_content: "same" lets the incoming gradient hold the case's NaN and infinities too. Else it is random:
            what becomes of a non-finite gradient within a reduction is not part of the contract.
        rounds_hidden: an intermediate may be rounded to the dtype of the inputs.
        dtypes: in which the entry says something that another entry does not.
    """

    name: str
    arguments: Callable[[Maker], dict[str, Any]]
    leaves: tuple[str, ...] = ()
    copies: bool = False
    copies_gradient: bool = False
    terms: Callable[[Size], int] = lambda size: 1
    gradient_content: str = "same"
    rounds_hidden: bool = False
    dtypes: tuple[torch.dtype, ...] = DTYPES

    def split(self, arguments: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
        """The arguments with fresh leaves that require a gradient, and those leaves."""
        ready = {name: a.detach().requires_grad_() if name in self.leaves else a for name, a in arguments.items()}
        return ready, [ready[name] for name in self.leaves]


def _weights(m: Maker, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {
        "w_in": m.weight(m.H, m.D),
        "ln_weight": m.weight(m.H, dtype=dtype),
        "ln_bias": m.weight(m.H, dtype=dtype),
        "w_out": m.weight(m.H, dtype=dtype),
    }


OPS = {
    "topk_select": Op("topk_select", lambda m: {"scores": m.scores(), "k": m.k}),
    "soft_rank": Op(
        "soft_rank",
        lambda m: {"scores": m.scores(), "tau": TAU},
        leaves=("scores",),
        terms=lambda size: size.N,
        gradient_content="random",
    ),
    "token_gather": Op(
        "token_gather",
        lambda m: {"x": m.tokens(), "index": m.index()},
        leaves=("x",),
        copies=True,
        copies_gradient=True,
    ),
    "token_gather of a table": Op(
        "token_gather",
        lambda m: {"x": m.table(), "index": m.index()},
        leaves=("x",),
        copies=True,
        terms=lambda size: size.B,
    ),
    "token_scatter": Op(
        "token_scatter",
        lambda m: {"base": m.tokens(), "index": m.index(), "src": m.floats(m.k, m.D)},
        leaves=("base", "src"),
        copies=True,
        copies_gradient=True,
    ),
    "residual_gate": Op(
        "residual_gate",
        lambda m: {"x": m.tokens(), "inclusion": m.inclusion(), "kept": m.index()},
        leaves=("x", "inclusion"),
        copies=True,
        terms=lambda size: size.D,
    ),
    "counterfactual_scatter": Op(
        "counterfactual_scatter",
        lambda m: {
            "base": m.tokens(),
            "kept": m.index(),
            "src": m.floats(m.k, m.D),
            "inclusion": m.inclusion(),
            "update": m.tokens(),
            "kappa": KAPPA,
        },
        leaves=("base", "src", "inclusion"),
        copies=True,
        terms=lambda size: 2 * size.D,
    ),
    "router_score": Op(
        "router_score",
        lambda m: {"x": m.tokens(), "context": m.floats(m.H), **_weights(m), "eps": EPS},
        leaves=("x", "context", "w_in", "ln_weight", "ln_bias", "w_out"),
        terms=lambda size: size.D + size.H + size.B * size.N,
        gradient_content="random",
        rounds_hidden=True,
    ),
    "router_score with wide context": Op(
        "router_score",
        lambda m: {
            "x": m.tokens(),
            "context": m.floats(m.H, dtype=wide(m.dtype)),
            **_weights(m, wide(m.dtype)),
            "eps": EPS,
        },
        leaves=("x", "context", "w_in", "ln_weight", "ln_bias", "w_out"),
        terms=lambda size: size.D + size.H + size.B * size.N,
        gradient_content="random",
        rounds_hidden=True,
        dtypes=(torch.bfloat16, torch.float16),
    ),
    "gather_modulate": Op(
        "gather_modulate",
        lambda m: {"x": m.tokens(), "index": m.index(), "shift": m.floats(m.D), "scale": m.scale(), "eps": EPS},
        leaves=("x", "shift", "scale"),
        terms=lambda size: size.D + size.k,
        gradient_content="random",
    ),
    "scatter_residual": Op(
        "scatter_residual",
        lambda m: {"base": m.tokens(), "index": m.index(), "update": m.floats(m.k, m.D), "gate": m.floats(m.D)},
        leaves=("base", "update", "gate"),
        terms=lambda size: size.k,
    ),
    "scatter_mean": Op(
        "scatter_mean",
        lambda m: {"x": m.tokens(), "position": m.groups(), "num_groups": m.num_groups},
        leaves=("x",),
        terms=lambda size: size.N,
    ),
    "expert_dispatch": Op(
        "expert_dispatch",
        lambda m: {"x": m.list_of_tokens(), "experts": m.experts(), "num_experts": EXPERTS},
        leaves=("x",),
        copies=True,
        terms=lambda size: CHOICES,
    ),
    "expert_dispatch with a capacity": Op(
        "expert_dispatch",
        lambda m: {
            "x": m.list_of_tokens(),
            "experts": m.experts(),
            "num_experts": EXPERTS,
            "capacity": max(1, m.tokens_in_all * CHOICES // EXPERTS - 1),
        },
        leaves=("x",),
        copies=True,
        terms=lambda size: CHOICES,
    ),
    "expert_combine": Op(
        "expert_combine",
        lambda m: {"rows": m.expert_rows(), "place": m.place(), "weight": m.expert_weight()},
        leaves=("rows", "weight"),
        terms=lambda size: size.D + CHOICES,
    ),
    "ema_scan": Op(
        "ema_scan",
        lambda m: {"x": m.tokens(), "p": m.restarts()},
        leaves=("x", "p"),
        terms=lambda size: size.N + size.D,
        gradient_content="random",
        rounds_hidden=True,
    ),
    "facility_location": Op(
        "facility_location", lambda m: {"similarity": m.floats(m.N, m.N), "count": m.k if m.N < 100 else min(m.k, 3)}
    ),
}
DIFFERENTIABLE = {key: op for key, op in OPS.items() if op.leaves}
INDEXED = [key for key, op in DIFFERENTIABLE.items() if op.name not in ("soft_rank", "router_score")]


def tuple_of(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else tuple(result) if isinstance(result, list) else (result,)


def floating(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Those that have a gradient."""
    return tuple(out for out in outputs if out.is_floating_point())


def native(op: Op) -> Callable:
    """The raw op."""
    return getattr(torch.ops.shiva, op.name)


def forward_backward(function: Callable, op: Op, maker: Maker) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The outputs of function on the case's arguments, and the gradients of the op's leaves."""
    arguments, leaves = op.split(op.arguments(maker))
    outputs = tuple_of(function(*arguments.values()))
    if not leaves:
        return outputs, ()
    content = maker.content if op.gradient_content == "same" else "random"
    return outputs, torch.autograd.grad(floating(outputs), leaves, maker.gradients(outputs, content))
