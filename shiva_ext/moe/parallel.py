"""Experts shared out among processes: tokens travel to the experts and back by all-to-all."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from shiva_ext import ops

from .experts import Experts
from .layer import SparseMoE, expert_layers


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


class ShardedExperts(nn.Module):
    """The experts of one layer, of which this process has a run of consecutive ones.

    Attributes:
        experts: those of this process.
    """

    def __init__(self, whole: Experts, group: dist.ProcessGroup):
        super().__init__()
        self.group, self.world = group, dist.get_world_size(group)
        self.num_experts, self.here = whole.num_experts, whole.num_experts // self.world
        first = dist.get_rank(group) * self.here
        self.experts = whole.map(lambda stacked: stacked[first : first + self.here].clone())
        for part in self.experts.parameters():
            if part.requires_grad:
                # Every process' loss is a mean over its own tokens; here their gradients meet, and are averaged.
                part.register_hook(lambda grad: grad / self.world)

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """rows [R,D] of this process' tokens, sorted by expert, ends int32 [E] -> [R,D]."""
        counts = ends.diff(prepend=ends.new_zeros(1)).view(self.world, self.here).contiguous()
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self.group)
        sent, received = counts.sum(dim=1).tolist(), arriving.sum(dim=1).tolist()
        rows = _Exchange.apply(rows, sent, received, self.group)
        # They come by process, then expert: the dispatch sorts them by expert.
        expert = torch.arange(self.here, device=ends.device).repeat(self.world)
        expert = expert.repeat_interleave(arriving.flatten().long()).unsqueeze(1)
        mine, place, mine_ends = ops.expert_dispatch(rows, expert, self.here)
        results = self.experts(mine, mine_ends)
        ones = torch.ones(place.shape, dtype=results.dtype, device=results.device)
        back = ops.expert_combine(results, place, ones)
        return _Exchange.apply(back, received, sent, self.group)


def _reduce_over(group: dist.ProcessGroup):
    def reduce(total: Tensor, count: Tensor, tokens: int) -> tuple[Tensor, Tensor, int]:
        numbers = torch.cat([count, count.new_tensor([tokens])])
        dist.all_reduce(numbers, group=group)
        return all_reduce(total, group=group), numbers[:-1], int(numbers[-1])

    return reduce


def shard_experts(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Keep only this process' share of every layer's experts; call it on every process, with the same weights.

    Each process then works on its own part of the batch; all must call the model equally often. Gradients are those of
    one process with the whole batch, if the others are averaged as ``DistributedDataParallel`` does, which leaves the
    experts alone after this. The balance loss counts the tokens of all processes.

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
    world, layers = dist.get_world_size(group), expert_layers(model)
    for name, layer in layers.items():
        check_shardable(name, layer, world)
    kept = set()
    for name, layer in layers.items():
        layer.experts = ShardedExperts(layer.experts, group)
        layer.reduce_balance = _reduce_over(group)
        kept |= {f"{name}.experts.{own}" for own, _ in layer.experts.named_parameters()}
    ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ())) | kept
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)


def check_shardable(name: str, layer: SparseMoE, world: int) -> None:
    """Raises ValueError unless the layer's experts can be shared out among so many processes."""
    if isinstance(layer.experts, ShardedExperts):
        raise ValueError(f"the experts of {name} are shared out already")
    if layer.config.capacity_factor is not None:
        raise ValueError(f"{name} has capacity_factor={layer.config.capacity_factor}; shard_experts needs None")
    if layer.config.num_experts % world:
        raise ValueError(f"{name} has {layer.config.num_experts} experts, which {world} processes cannot share evenly")


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
    ignored = {n for n in getattr(model, "_ddp_params_and_buffers_to_ignore", ()) if ".experts." not in n}
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
