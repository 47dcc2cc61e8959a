"""The cases of bench_ops.py: what is timed, what it is checked against, who the rivals are, and the goals."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product

import torch
import torch.nn.functional as F

from shiva_ext import reference

shiva = torch.ops.shiva
SHAPES = ((2, 1024), (2, 4096), (2, 16384), (1, 65536))
QUICK_SHAPES = SHAPES[:2]
CHANNELS, DTYPES, KEPT = (1536, 3072), (torch.float32, torch.bfloat16), (0.4, 0.6, 0.8)
PAIRWISE_LIMIT = 4096  # tokens; the pairwise formula needs several N x N matrices
ARRAY_LIMIT = 1 << 29  # bytes of the tokens; larger cases do not fit beside the rivals' results
LAST_LEVEL_CACHE = 64 << 20  # more than the machine's
HIDDEN, TAU, EPS = 64, 0.2, 1e-6
SCANNED, SCAN_CHUNK = ((2, 1024), (2, 4096), (1, 16384)), 64  # rows and tokens; tokens a rival takes at once
ROUTED = ((1024, 16, 2), (8192, 16, 2), (8192, 64, 6), (65536, 16, 2))  # tokens, experts, experts a token


@dataclass
class Case:
    """One op at one size.

    Attributes:
        ours: the op's call.
        wanted: the reference's call on the same values, in float64 where it computes.
        rivals: other ways to the same result, or to a part of it.
        bytes_moved: what the op must read and write, where that is the whole of its work.
    """

    op: str
    shape: tuple[int, ...]
    dtype: str
    ours: Callable
    wanted: Callable
    rivals: dict[str, Callable]
    kept: float | None = None
    bytes_moved: int | None = None
    exact: bool = False
    tolerance: float = field(default=1e-5)

    def check(self) -> None:
        """Raises AssertionError if the op's result is not the reference's."""
        got, wanted = self.ours(), self.wanted()
        pairs = zip(got, wanted, strict=True) if isinstance(got, (tuple, list)) else [(got, wanted)]
        for ours, exact in pairs:
            if self.exact:
                torch.testing.assert_close(ours, exact, rtol=0, atol=0)
            else:
                scale = max(exact.abs().max().item(), 1.0)
                torch.testing.assert_close(ours.double(), exact.double(), rtol=0, atol=self.tolerance * scale)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tolerance(dtype: torch.dtype) -> float:
    return 16 * max(torch.finfo(dtype).eps, 1e-7)


def _wide(*values):
    return [v.double() if torch.is_tensor(v) and v.is_floating_point() else v for v in values]


def topk_select(quick: bool) -> Iterator[Case]:
    for B, N in QUICK_SHAPES if quick else SHAPES:
        for dtype in DTYPES:
            for share in (0.6,) if quick else KEPT:
                scores, k = torch.randn(B, N).to(dtype), int(share * N)

                def torch_way(scores=scores, k=k, B=B, N=N):
                    kept = torch.topk(scores, k, sorted=False).indices.sort(dim=1).values
                    rest = torch.ones(B, N, dtype=torch.bool).scatter_(1, kept, False)
                    return kept, rest.nonzero()[:, 1].view(B, N - k)

                rivals = {
                    "topk + sort + complement": torch_way,
                    "torch.topk alone": lambda scores=scores, k=k: torch.topk(scores, k, sorted=False),
                }
                yield Case(
                    *("topk_select", (B, N), _name(dtype), lambda s=scores, k=k: shiva.topk_select(s, k)),
                    lambda s=scores, k=k: reference.topk_select(s, k),
                    rivals,
                    kept=share,
                    exact=True,
                )


def soft_rank(quick: bool) -> Iterator[Case]:
    for B, N in QUICK_SHAPES if quick else SHAPES:
        for tau in (0.2, 0.02):
            scores = torch.randn(B, N, requires_grad=True)
            grad = torch.randn(B, N)

            def both(op, scores=scores, grad=grad, tau=tau):
                ranks = op(scores, tau)
                return ranks.detach(), torch.autograd.grad(ranks, scores, grad)[0]

            def formula(scores, tau):
                return 1 + torch.sigmoid((scores.unsqueeze(-2) - scores.unsqueeze(-1)) / tau).sum(-1) - 0.5

            def exact(scores=scores, grad=grad, tau=tau):
                wide, results = scores.detach().double(), []
                for row, g in zip(wide, grad.double(), strict=True):  # in blocks: N x N does not fit
                    ranks, grads = torch.empty_like(row), torch.empty_like(row)
                    for rows in torch.arange(len(row)).split(512):
                        sigmoid = torch.sigmoid((row - row[rows, None]) / tau)
                        ranks[rows] = 0.5 + sigmoid.sum(-1)
                        grads[rows] = (sigmoid * (1 - sigmoid) * (g - g[rows, None])).sum(-1) / tau
                    results.append((ranks, grads))
                return [torch.stack(part) for part in zip(*results, strict=True)]

            rivals = {"pairwise formula": lambda both=both, f=formula: both(f)} if N <= PAIRWISE_LIMIT else {}
            yield Case(
                *("soft_rank fwd + bwd", (B, N, tau), "float32", lambda both=both: both(shiva.soft_rank)),
                *(exact, rivals),
                tolerance=2e-5,
            )


def _arrays(quick: bool) -> Iterator[tuple]:
    """(B, N, D, dtype, x), as far as memory goes."""
    for B, N in QUICK_SHAPES if quick else SHAPES:
        for D in CHANNELS:
            for dtype in DTYPES:
                if B * N * D * dtype.itemsize <= ARRAY_LIMIT:
                    yield B, N, D, dtype, torch.randn(B, N, D).to(dtype)


def _tokens(quick: bool) -> Iterator[tuple]:
    """(B, N, D, dtype, kept share, x, kept)"""
    for B, N, D, dtype, x in _arrays(quick):
        for share in (0.6,) if quick else KEPT:
            yield B, N, D, dtype, share, x, shiva.topk_select(torch.randn(B, N), int(share * N))[0]


def _flat(kept, N):
    return (kept + N * torch.arange(len(kept))[:, None]).view(-1)


def token_gather(quick: bool) -> Iterator[Case]:
    for B, N, D, dtype, share, x, kept in _tokens(quick):
        k = kept.shape[1]
        expanded, flat, row = kept[..., None].expand(-1, -1, D), _flat(kept, N), torch.arange(B)[:, None]
        rivals = {
            "torch.gather": lambda x=x, i=expanded: x.gather(1, i),
            "index_select": lambda x=x, i=flat, B=B: x.flatten(0, 1).index_select(0, i).unflatten(0, (B, -1)),
            "x[rows, index]": lambda x=x, i=kept, row=row: x[row, i],
            "take_along_dim": lambda x=x, i=kept: torch.take_along_dim(x, i[..., None], 1),
        }
        yield Case(
            *("token_gather", (B, N, D), _name(dtype), lambda x=x, i=kept: shiva.token_gather(x, i)),
            *(lambda x=x, i=kept: reference.token_gather(x, i), rivals, share),
            bytes_moved=2 * B * k * D * dtype.itemsize,
            exact=True,
        )


def token_scatter(quick: bool) -> Iterator[Case]:
    for B, N, D, dtype, share, x, kept in _tokens(quick):
        src = torch.randn(B, kept.shape[1], D).to(dtype)
        expanded, flat, row = kept[..., None].expand(-1, -1, D), _flat(kept, N), torch.arange(B)[:, None]
        rivals = {
            "torch.scatter": lambda x=x, i=expanded, s=src: x.scatter(1, i, s),
            "index_copy": lambda x=x, i=flat, s=src: x.flatten(0, 1).index_copy(0, i, s.flatten(0, 1)).view_as(x),
            "index_put": lambda x=x, i=kept, row=row, s=src: x.index_put((row, i), s),
        }
        yield Case(
            *("token_scatter", (B, N, D), _name(dtype), lambda x=x, i=kept, s=src: shiva.token_scatter(x, i, s)),
            *(lambda x=x, i=kept, s=src: reference.token_scatter(x, i, s), rivals, share),
            bytes_moved=2 * x.nbytes,
            exact=True,
        )


def gather_modulate(quick: bool) -> Iterator[Case]:
    for B, N, D, dtype, share, x, kept in _tokens(quick):
        shift, scale = torch.randn(B, D).to(dtype), torch.randn(B, D).to(dtype)

        def eager(x=x, i=kept, shift=shift, scale=scale, D=D):
            rows = x.gather(1, i[..., None].expand(-1, -1, D))
            return F.layer_norm(rows, (D,), eps=EPS) * (1 + scale[:, None]) + shift[:, None]

        rivals = {"gather, layer_norm, modulate": eager, "token_gather": lambda x=x, i=kept: shiva.token_gather(x, i)}
        arguments = (x, kept, shift, scale, EPS)
        yield Case(
            *("gather_modulate", (B, N, D), _name(dtype), lambda a=arguments: shiva.gather_modulate(*a)),
            *(lambda a=arguments: reference.gather_modulate(*_wide(*a)), rivals, share),
            tolerance=_tolerance(dtype),
        )


def scatter_residual(quick: bool) -> Iterator[Case]:
    for B, N, D, dtype, share, x, kept in _tokens(quick):
        update, gate, row = torch.randn(B, kept.shape[1], D).to(dtype), torch.randn(B, D).to(dtype), torch.arange(B)

        def eager(x=x, i=kept, update=update, gate=gate, row=row[:, None]):
            return x.index_put((row, i), x[row, i] + gate[:, None] * update)

        arguments = (x, kept, update, gate)
        rivals = {"gate, index_put": eager, "token_scatter": lambda x=x, i=kept, u=update: shiva.token_scatter(x, i, u)}
        yield Case(
            *("scatter_residual", (B, N, D), _name(dtype), lambda a=arguments: shiva.scatter_residual(*a)),
            *(lambda a=arguments: reference.scatter_residual(*_wide(*a)), rivals, share),
            tolerance=_tolerance(dtype),
        )


def scatter_mean(quick: bool) -> Iterator[Case]:
    """Groups as token merging makes them: of the kept tokens the first quarter takes all that are merged."""
    for B, N, D, dtype, share, x, kept in _tokens(quick):
        M = kept.shape[1]
        position = torch.randint(max(1, M // 4), (B, N)).scatter(1, kept, torch.arange(M).expand(B, -1))
        flat = _flat(position, M)
        expanded = flat[:, None].expand(-1, D)

        def index_add(x=x, i=flat, B=B, M=M, D=D):
            count = torch.bincount(i, minlength=B * M).clamp_min(1).to(x.dtype)
            return (x.new_zeros(B * M, D).index_add(0, i, x.flatten(0, 1)) / count[:, None]).view(B, M, D)

        def scatter_reduce(x=x, i=expanded, B=B, M=M, D=D):
            return x.new_zeros(B * M, D).scatter_reduce(0, i, x.flatten(0, 1), "mean", include_self=False).view(B, M, D)

        arguments = (x, position, M)
        yield Case(
            *("scatter_mean", (B, N, D), _name(dtype), lambda a=arguments: shiva.scatter_mean(*a)),
            lambda a=arguments: reference.scatter_mean(*_wide(*a)),
            {"scatter_reduce mean": scatter_reduce, "index_add, divide": index_add},
            share,
            bytes_moved=x.nbytes + x.nbytes * M // N,
            tolerance=_tolerance(dtype),
        )


def facility_location(quick: bool) -> Iterator[Case]:
    """Half of the tokens, of the cosines of random ones: tiles of 4, 8 and 16 tokens a side, and a whole image."""
    for B, n in ((512, 16), (128, 64), (32, 256), (1, 1024)):
        unit = F.normalize(torch.randn(B, n, 64), dim=-1)
        similarity, count = unit @ unit.transpose(1, 2), n // 2

        def torch_way(S=similarity, count=count, B=B, n=n):
            covered, chosen = torch.full((B, n, 1), -1.0), torch.zeros(B, n, dtype=torch.bool)
            for _ in range(count):
                total = torch.maximum(S, covered).sum(dim=1)
                best = total.masked_fill(chosen, -torch.inf).argmax(dim=1, keepdim=True)
                chosen = chosen.scatter(1, best, True)
                covered = torch.maximum(covered, S.gather(2, best[:, None].expand(-1, n, -1)))
            return chosen.nonzero()[:, 1].view(B, count)

        yield Case(
            *("facility_location", (B, n), "float32", lambda s=similarity, k=count: shiva.facility_location(s, k)),
            lambda s=similarity, k=count: reference.facility_location(s, k),
            {"the loop in torch": torch_way},
            kept=0.5,
            exact=True,
        )


def best_destination(quick: bool) -> Iterator[Case]:
    """Not an op: what the row maximum of token merging's cosines costs, of which an op of its own could save a part."""
    for B, N in QUICK_SHAPES:
        for D in (384, 1536):
            unit = F.normalize(torch.randn(B, N, D), dim=-1)
            others = unit[:, ::4].transpose(1, 2).contiguous()
            yield Case(
                *("best_destination", (B, N, D), "float32", lambda u=unit, o=others: (u @ o).max(dim=-1).values),
                lambda u=unit, o=others: (u.double() @ o.double()).amax(dim=-1),
                {"the matmul alone": lambda u=unit, o=others: u @ o},
            )


def _routed(quick: bool) -> Iterator[tuple]:
    """(shape, dtype, x, experts, weight) with shape (1, tokens, channels, experts, experts a token)."""
    for T, E, K in ROUTED[:2] if quick else ROUTED:
        for D in (384, 1152):
            for dtype in DTYPES:
                if K * T * D * dtype.itemsize <= ARRAY_LIMIT:
                    weight, experts = torch.randn(T, E).softmax(dim=1).topk(K)
                    yield (1, T, D, E, K), dtype, torch.randn(T, D).to(dtype), experts, weight


def _sort(experts, E):
    """-> the choices by expert, the place of each, the experts' ends"""
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    return order, place.view_as(experts), torch.bincount(flat, minlength=E).cumsum(0)


def expert_dispatch(quick: bool) -> Iterator[Case]:
    for shape, dtype, x, experts, _ in _routed(quick):
        E, K = shape[3:]

        def sort(x=x, experts=experts, E=E, K=K):
            order, place, ends = _sort(experts, E)
            return x.index_select(0, order // K), place, ends

        def loop(x=x, experts=experts, E=E):
            return [x.index_select(0, (experts == e).nonzero()[:, 0]) for e in range(E)]

        arguments = (x, experts, E)
        yield Case(
            *("expert_dispatch", shape, _name(dtype), lambda a=arguments: shiva.expert_dispatch(*a)),
            lambda a=arguments: reference.expert_dispatch(*a),
            {"argsort, index_select": sort, "loop over experts": loop},
            bytes_moved=(1 + K) * x.nbytes,
            exact=True,
        )


def expert_combine(quick: bool) -> Iterator[Case]:
    """The rivals know which choice each row belongs to, and have weights of the rows' dtype."""
    for shape, dtype, x, experts, weight in _routed(quick):
        _, T, D, E, K = shape
        rows, place, _ = shiva.expert_dispatch(x, experts, E)
        order, _, ends = _sort(experts, E)
        flat, ends, token, small = place.flatten(), ends.tolist(), order // K, weight.to(dtype)
        share = small.flatten()[order, None]

        def select(rows=rows, i=flat, w=small[..., None], T=T, K=K):
            return (rows.index_select(0, i).view(T, K, -1) * w).sum(dim=1)

        def index_add(rows=rows, token=token, share=share, T=T, D=D):
            return rows.new_zeros(T, D).index_add_(0, token, rows * share)

        def loop(rows=rows, token=token, share=share, ends=ends, T=T, D=D):
            out = rows.new_zeros(T, D)
            for begin, end in zip([0, *ends], ends, strict=False):
                out.index_add_(0, token[begin:end], rows[begin:end] * share[begin:end])
            return out

        arguments = (rows, place, weight)
        yield Case(
            *("expert_combine", shape, _name(dtype), lambda a=arguments: shiva.expert_combine(*a)),
            lambda a=arguments: reference.expert_combine(*_wide(*a)),
            {"index_select, weighted sum": select, "index_add": index_add, "loop over experts": loop},
            bytes_moved=(1 + K) * x.nbytes,
            tolerance=_tolerance(dtype),
        )


def expert_rows(quick: bool) -> Iterator[Case]:
    """Both ops, with experts that return their rows: all that a mixture of experts costs beside them."""
    for shape, dtype, x, experts, weight in _routed(quick):
        E, K = shape[3:]
        small = weight.to(dtype)

        def both(op, x=x, experts=experts, weight=weight, E=E):
            rows, place, _ = op.expert_dispatch(x, experts, E)
            return op.expert_combine(rows, place, weight)

        def sort(x=x, experts=experts, w=small, E=E, K=K):
            order, _, _ = _sort(experts, E)
            token = order // K
            rows = x.index_select(0, token)
            return torch.zeros_like(x).index_add_(0, token, rows * w.flatten()[order, None])

        def loop(x=x, experts=experts, w=small, E=E):
            out = torch.zeros_like(x)
            for e in range(E):
                token, choice = (experts == e).nonzero(as_tuple=True)
                out.index_add_(0, token, x[token] * w[token, choice, None])
            return out

        def published(x=x, experts=experts, w=small, E=E, K=K):
            """DiT-MoE's training path: every token K times, its experts' rows by a mask, there and back."""
            copies, flat = x.repeat_interleave(K, dim=0), experts.flatten()
            out = torch.empty_like(copies)
            for e in range(E):
                out[flat == e] = copies[flat == e]
            return (out.view(*experts.shape, -1) * w.unsqueeze(-1)).sum(dim=1)

        yield Case(
            *("expert_dispatch + combine", shape, _name(dtype), lambda both=both: both(shiva)),
            lambda both=both, x=x, w=weight: both(reference, x=x.double(), weight=w.double()),
            {"argsort, index_select, index_add": sort, "loop over experts": loop, "published loop": published},
            tolerance=_tolerance(dtype),
        )


def _scan_loop(x, p):
    """A token after the other, in float32."""
    share = p.unsqueeze(-1)
    state, found = torch.zeros_like(share[:, 0] * x[:, 0]), []
    for scaled, rest in zip((share * x).unbind(1), (1 - share).unbind(1), strict=True):
        state = torch.addcmul(scaled, rest, state)
        found.append(state)
    return torch.stack(found, dim=1).to(x.dtype)


def _scan_doubling(x, p):
    """e_m of ever longer stretches of tokens: twice as many in each step."""
    rest, state, reach = (1 - p).unsqueeze(-1), p.unsqueeze(-1) * x, 1
    while reach < x.shape[1]:
        state = torch.cat([state[:, :reach], torch.addcmul(state[:, reach:], rest[:, reach:], state[:, :-reach])], 1)
        rest = torch.cat([rest[:, :reach], rest[:, reach:] * rest[:, :-reach]], 1)
        reach *= 2
    return state.to(x.dtype)


def _scan_matmul(x, p):
    """A matmul for the tokens of each chunk, in the dtype of x, and a loop over the chunks."""
    B, M, D = x.shape
    share, tokens = p.view(B, -1, SCAN_CHUNK), x.view(B, -1, SCAN_CHUNK, D)
    rest = 1 - share
    after = torch.ones(SCAN_CHUNK, SCAN_CHUNK, dtype=torch.bool).tril(-1)
    weight = torch.where(after, rest.unsqueeze(-1), 1).cumprod(-2).tril() * share.unsqueeze(-2)
    alone, decay = weight.to(x.dtype) @ tokens, rest.cumprod(-1).unsqueeze(-1)
    state, before = torch.zeros_like(decay[:, 0, 0] * alone[:, 0, 0]), []
    for left, through in zip(alone[:, :, -1].unbind(1), decay[:, :, -1].unbind(1), strict=True):
        before.append(state)
        state = torch.addcmul(left.float(), through, state)
    return torch.addcmul(alone, decay, torch.stack(before, 1).unsqueeze(2)).to(x.dtype).view(B, M, D)


def ema_scan(quick: bool) -> Iterator[Case]:
    rivals = {"loop over tokens": _scan_loop, "doubling": _scan_doubling, "matmul in chunks": _scan_matmul}
    for (B, M), D, dtype in product(SCANNED[: 2 if quick else 3], (384, 1536), DTYPES):
        x, p, grad = torch.randn(B, M, D).to(dtype), torch.rand(B, M), torch.randn(B, M, D).to(dtype)
        p[:, ::50] = 1

        def both(op, x=x, p=p, grad=grad):
            x, p = (t.detach().requires_grad_() for t in (x, p))
            out = op(x, p)
            return out.detach(), *torch.autograd.grad(out, [x, p], grad.to(out.dtype))

        yield Case(
            *("ema_scan", (B, M, D), _name(dtype), lambda x=x, p=p: shiva.ema_scan(x, p)),
            lambda x=x, p=p: reference.ema_scan(x.double(), p.double()),
            {name: lambda x=x, p=p, rival=rival: rival(x, p) for name, rival in rivals.items()},
            bytes_moved=2 * x.nbytes,
            tolerance=_tolerance(dtype),
        )
        yield Case(
            *("ema_scan fwd + bwd", (B, M, D), _name(dtype), lambda both=both: both(shiva.ema_scan)),
            lambda both=both, x=x, p=p: both(reference.ema_scan, x.double(), p.double()),
            {name: lambda both=both, rival=rival: both(rival) for name, rival in rivals.items()},
            tolerance=_tolerance(dtype),
        )


def residual_gate(quick: bool) -> Iterator[Case]:
    """The backward alone. It must read both gradients and x once, and write the gradient of x."""
    for B, N, D, dtype, share, x, kept in _tokens(quick):
        grad_selected, grad_base = torch.randn(B, kept.shape[1], D).to(dtype), torch.randn(B, N, D).to(dtype)
        arguments = (grad_selected, grad_base, x, kept)
        total = grad_selected.nbytes + grad_base.nbytes + 2 * x.nbytes
        source, target = torch.empty(total // 2, dtype=torch.uint8), torch.empty(total // 2, dtype=torch.uint8)
        rivals = {
            "plain formula": lambda a=arguments: reference.residual_gate_backward(*a),
            "copy of as many bytes": lambda s=source, t=target: t.copy_(s),
        }
        yield Case(
            *("residual_gate backward", (B, N, D), _name(dtype), lambda a=arguments: shiva.residual_gate_backward(*a)),
            *(lambda a=arguments: reference.residual_gate_backward(*_wide(*a)), rivals, share),
            bytes_moved=total,
            tolerance=_tolerance(dtype),
        )


def router_score(quick: bool) -> Iterator[Case]:
    for B, N, D, dtype, x in _arrays(quick):
        w_in = (torch.randn(HIDDEN, D) / D**0.5).to(dtype)
        arguments = (x, torch.randn(B, HIDDEN), w_in, *(torch.randn(HIDDEN) for _ in range(3)), EPS)
        yield Case(
            *("router_score", (B, N, D), _name(dtype), lambda a=arguments: shiva.router_score(*a)),
            lambda a=arguments: reference.router_score(*_wide(*a)),
            {"F.linear": lambda x=x, w=w_in: F.linear(x, w)},
            tolerance=4 * _tolerance(dtype),
        )
        grad, hidden_grad = torch.randn(B, N), torch.randn(B * N, HIDDEN).to(dtype)
        leaves = [a.double().requires_grad_() if torch.is_tensor(a) else a for a in arguments]

        def exact(leaves=leaves, grad=grad):
            scores = reference.router_score(*leaves)
            return torch.autograd.grad(scores, leaves[:-1], grad.double())

        projection = shiva.router_score_and_projection(*arguments)[1]
        yield Case(
            *("router_score backward", (B, N, D), _name(dtype)),
            lambda g=grad, a=arguments, p=projection: shiva.router_score_backward(g, *a, p),
            exact,
            {"F.linear's backward": lambda x=x, w=w_in, g=hidden_grad: (g @ w, g.T @ x.flatten(0, 1))},
            tolerance=4 * _tolerance(dtype) * max(1.0, B * N / 1024) ** 0.5,  # of sums over all tokens
        )


MAKERS = {
    function.__name__: function
    for function in (
        *(topk_select, soft_rank, token_gather, token_scatter),
        *(
            gather_modulate,
            scatter_residual,
            scatter_mean,
            facility_location,
            best_destination,
            expert_dispatch,
            expert_combine,
            expert_rows,
            ema_scan,
            residual_gate,
            router_score,
        ),
    )
}
OPS = list(MAKERS)


def cases(ops: list[str], quick: bool) -> Iterator[Case]:
    for op in ops:
        yield from MAKERS[op](quick)


@dataclass(frozen=True)
class Target:
    """A goal: ``value(row)``, None where it says nothing about the row, should be at least ``least``."""

    text: str
    least: float
    value: Callable[[dict], float | None]


def _ratio(op: str, least: float, rivals: tuple[str, ...], text: str, only=lambda row: True) -> Target:
    """The smallest ratio to any of the rivals (all of them if none is named)."""

    def value(row):
        found = [ratio for name, ratio in row["ratio"].items() if not rivals or name in rivals]
        return min(found) if row["op"] == op and found and only(row) else None

    return Target(text, least, value)


def _bandwidth(op: str) -> Target:
    def value(row):
        size = 4 if row["dtype"] == "float32" else 2
        B, N, *D = row["shape"]
        past_cache = row["op"] == op and B * N * D[0] * size * (row["kept"] or 1) > LAST_LEVEL_CACHE
        return row.get("share_of_copy_bandwidth") if past_cache else None

    return Target(f"{op}: share of the copy bandwidth past the last-level cache", 0.85, value)


ALL = ("topk + sort + complement",)
TARGETS = (
    _ratio(
        "topk_select",
        15,
        ALL,
        "topk_select at (2, 4096), all three steps in torch / ours",
        lambda r: tuple(r["shape"]) == (2, 4096),
    ),
    _ratio(
        "topk_select",
        20,
        ALL,
        "topk_select at (1, 65536), all three steps / ours",
        lambda r: tuple(r["shape"]) == (1, 65536),
    ),
    _ratio("topk_select", 1, ("torch.topk alone",), "topk_select, torch.topk alone / ours"),
    _ratio("token_gather", 1, (), "token_gather, best of torch / ours"),
    _ratio(
        "token_gather",
        3,
        ("torch.gather",),
        "token_gather, torch.gather / ours, bfloat16",
        lambda r: r["dtype"] == "bfloat16",
    ),
    _bandwidth("token_gather"),
    _ratio("token_scatter", 1, (), "token_scatter, best of torch / ours"),
    _bandwidth("token_scatter"),
    _ratio(
        "soft_rank fwd + bwd",
        100,
        (),
        "soft_rank at (2, 4096), tau .2, pairwise / ours",
        lambda r: tuple(r["shape"]) == (2, 4096, 0.2),
    ),
    _ratio("router_score", 1 / 1.15, (), "router_score, F.linear / ours"),
    _ratio("router_score backward", 1 / 1.25, (), "router_score backward, F.linear's / ours"),
    _ratio("gather_modulate", 2.5, ("gather, layer_norm, modulate",), "gather_modulate, eager / ours"),
    _ratio("gather_modulate", 1 / 1.15, ("token_gather",), "gather_modulate, token_gather / ours"),
    _ratio("scatter_residual", 2.5, ("gate, index_put",), "scatter_residual, eager / ours"),
    _ratio("scatter_residual", 1 / 1.15, ("token_scatter",), "scatter_residual, token_scatter / ours"),
    _ratio("scatter_mean", 1, (), "scatter_mean, best of torch / ours"),
    _ratio("facility_location", 1, (), "facility_location, the loop in torch / ours"),
    _ratio("expert_dispatch", 1, (), "expert_dispatch, best of torch / ours"),
    _ratio("expert_combine", 1, (), "expert_combine, best of torch / ours"),
    *(
        _ratio(
            "expert_dispatch + combine",
            3,
            (loop,),
            f"expert_dispatch + combine of 8192 tokens, 16 experts, the {loop} / ours",
            lambda r: (r["shape"][1], r["shape"][3]) == (8192, 16),
        )
        for loop in ("published loop", "loop over experts")
    ),
    _ratio("ema_scan", 3, (), "ema_scan, best of torch / ours"),
    _ratio("ema_scan fwd + bwd", 3, (), "ema_scan and its backward, best of torch / ours"),
    _ratio("residual_gate backward", 1 / 1.2, ("copy of as many bytes",), "residual_gate backward, copy / ours"),
)
