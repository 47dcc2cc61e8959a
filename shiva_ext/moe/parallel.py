"""Experts shared out among processes: tokens travel to the experts and back by all-to-all."""

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shiva_ext import ops

from .experts import Experts
from .layer import SparseMoE, expert_layers

_IGNORED = "_ddp_params_and_buffers_to_ignore"


class _Exchange(torch.autograd.Function):
    """Rows to other processes: ``sent[p]`` consecutive ones to process p, ``received[p]`` from it."""

    @staticmethod
    def forward(ctx, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.back = (received, sent, group)
        out = rows.new_empty(sum(received), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Exchange.apply(grad, *ctx.back), None, None, None


class _Sum(torch.autograd.Function):
    """The sum over all processes, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, total = group, x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grad.contiguous(), ctx.group), None


class _ScaleGradient(torch.autograd.Function):
    """x, with its gradient times a factor."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class ShardedExperts(nn.Module):
    """The experts of one layer, of which this process has a run of consecutive ones.

    Attributes:
        experts: those of this process.
        world: processes that share them.
    """

    def __init__(self, whole: Experts, group: dist.ProcessGroup):
        super().__init__()
        self.group, self.world, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        self.num_experts, self.here = whole.num_experts, whole.num_experts // self.world
        first = self.rank * self.here
        self.experts = whole.map(lambda stacked: stacked[first : first + self.here].clone())
        # What copies one process' weights to all of them copies this too.
        self.register_buffer("mark", torch.tensor(self.rank, device=whole.w_in.device), persistent=False)

    def __deepcopy__(self, memo: dict) -> "ShardedExperts":
        """A process group cannot be copied; the copy belongs to the same."""
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        for name, value in self.__dict__.items():
            new.__dict__[name] = value if name == "group" else copy.deepcopy(value, memo)
        return new

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """rows [R,D] of this process' tokens, sorted by expert, ends int32 [E] -> [R,D]."""
        counts = ends.diff(prepend=ends.new_zeros(1)).view(self.world, self.here)
        marked = torch.cat([counts, self.mark.to(counts).expand(self.world, 1)], dim=1)
        arriving = torch.empty_like(marked)
        dist.all_to_all_single(arriving, marked, group=self.group)
        marks, arriving = arriving[:, -1].tolist(), arriving[:, :-1]
        if marks != list(range(self.world)):
            raise RuntimeError(
                "DistributedDataParallel has copied one process' experts to all others: wrap the model with "
                "shiva_ext.moe.data_parallel(model) in its place"
            )
        sent, received = counts.sum(dim=1).tolist(), arriving.sum(dim=1).tolist()
        rows = _Exchange.apply(rows, sent, received, self.group)
        # They come by process, then expert: the dispatch sorts them by expert.
        expert = torch.arange(self.here, device=ends.device).repeat(self.world)
        expert = expert.repeat_interleave(arriving.reshape(-1).long()).unsqueeze(1)
        mine, place, mine_ends = ops.expert_dispatch(rows, expert, self.here)
        # Every process' loss is a mean over its own tokens. The weights' gradients of all meet here, and are averaged.
        results = self.experts(_ScaleGradient.apply(mine, float(self.world)), mine_ends)
        results = _ScaleGradient.apply(results, 1 / self.world)
        ones = torch.ones(place.shape, dtype=results.dtype, device=results.device)
        return _Exchange.apply(ops.expert_combine(results, place, ones), received, sent, self.group)


def _reduce_over(group: dist.ProcessGroup):
    def reduce(total: Tensor, count: Tensor, tokens: int) -> tuple[Tensor, Tensor, int]:
        numbers = torch.cat([count, count.new_tensor([tokens])])
        dist.all_reduce(numbers, group=group)
        return _Sum.apply(total, group), numbers[:-1], int(numbers[-1])

    return reduce


def shard_experts(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Keep only this process' share of every layer's experts; call it on every process, with the same weights.

    Each process then works on its own part of the batch; all must call the model equally often. Gradients are those of
    one process with the whole batch, if the others are averaged: wrap the model with :func:`data_parallel`. The balance
    loss counts the tokens of all processes. Clip gradients with :func:`clip_grad_norm_`.

    Args:
        model: has layers of experts, e.g. from :func:`shiva_ext.moe.upcycle`. Changed in place.
        group: of processes; the default group if None.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: no layers of experts, a capacity, experts that cannot be shared out evenly, or shared out already.
    """
    if not dist.is_initialized():
        raise RuntimeError("shard_experts needs processes: call torch.distributed.init_process_group first")
    group = group or dist.group.WORLD
    layers = expert_layers(model)
    for name, layer in layers.items():
        check_shardable(name, layer, dist.get_world_size(group))
    for layer in layers.values():
        layer.experts = ShardedExperts(layer.experts, group)
        layer.reduce_balance = _reduce_over(group)


def check_shardable(name: str, layer: SparseMoE, world: int) -> None:
    """Raises ValueError unless the layer's experts can be shared out among so many processes."""
    if isinstance(layer.experts, ShardedExperts):
        raise ValueError(f"the experts of {name} are shared out already")
    if layer.config.capacity_factor is not None:
        raise ValueError(f"{name} has capacity_factor={layer.config.capacity_factor}; shard_experts needs None")
    if layer.config.num_experts % world:
        raise ValueError(f"{name} has {layer.config.num_experts} experts, which {world} processes cannot share evenly")


def _sharded(model: nn.Module) -> dict[str, ShardedExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ShardedExperts)}


def _own_names(model: nn.Module) -> set[str]:
    """Names of the weights and buffers that every process has for itself."""
    return {
        f"{name}.{own}" if name else own
        for name, module in _sharded(model).items()
        for own in [*dict(module.named_parameters()), *dict(module.named_buffers())]
    }


def data_parallel(model: nn.Module, **options) -> DistributedDataParallel:
    """``DistributedDataParallel(model, **options)`` that leaves experts alone which :func:`shard_experts` shared out.

    Args:
        model: the module that is to be wrapped, which has them anywhere inside; compiled or not.
        options: of ``DistributedDataParallel``.

    Note:
        Drop the last reference to what is returned before ``torch.distributed.destroy_process_group()``: a group that
        ends with it, under gloo, can wait forever for a thread that still holds tensors of an all-to-all.
    """
    before = getattr(model, _IGNORED, ())
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, {*before, *_own_names(model)})
    try:
        return DistributedDataParallel(model, **options)
    finally:
        setattr(model, _IGNORED, before)


def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """As ``torch.nn.utils.clip_grad_norm_``, with the norm over the experts of all processes: the same on each.

    Returns:
        the norm before.
    """
    own = _own_names(model)
    shared = [p.grad for n, p in model.named_parameters() if p.grad is not None and n not in own]
    mine = [p.grad for n, p in model.named_parameters() if p.grad is not None and n in own]
    device = next(model.parameters()).device
    squares = [
        sum((g.float().square().sum() for g in grads), torch.zeros((), device=device)) for grads in (shared, mine)
    ]
    for group in {module.group for module in _sharded(model).values()}:
        dist.all_reduce(squares[1], group=group)
    norm = (squares[0] + squares[1]).sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in (*shared, *mine):
        grad.mul_(factor.to(grad.dtype))
    return norm


def gather_experts(model: nn.Module) -> None:
    """Undo :func:`shard_experts` on every process: all experts everywhere, with the weights they have by now."""
    layers = expert_layers(model)
    for name, layer in layers.items():
        if not isinstance(layer.experts, ShardedExperts):
            raise ValueError(f"the experts of {name} are not shared out")
    for layer in layers.values():
        sharded = layer.experts

        def gathered(part: Tensor, sharded: ShardedExperts = sharded) -> Tensor:
            parts = [torch.empty_like(part) for _ in range(sharded.world)]
            dist.all_gather(parts, part.contiguous(), group=sharded.group)
            return torch.cat(parts)

        layer.experts, layer.reduce_balance = sharded.experts.map(gathered), None
