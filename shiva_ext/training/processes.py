"""Training on several processes: what is averaged over them, and frozen weights shared out among them.

Only router, policy and adapters have gradients, a few per cent of the model, so each process holds them whole and their
gradients are averaged once a step. The frozen weights are what fills the memory: FSDP2 shards them by blocks.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if _running() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _running() else 1


def average(values: Tensor, device: torch.device) -> Tensor:
    """Mean of a tensor over all processes, on the CPU; ``device`` is where they talk."""
    if world() == 1:
        return values
    values = values.to(device)
    dist.all_reduce(values)
    return (values / world()).cpu()


def gather_gradients(params: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their mean over all processes, in one message for each dtype."""
    if world() == 1:
        return
    params, by_dtype = list(params), {}
    # What a method uses may depend on the noise level: a parameter can have a gradient in some processes only.
    used = torch.tensor([float(p.grad is not None) for p in params], device=params[0].device if params else None)
    dist.all_reduce(used)
    for p, users in zip(params, used.tolist(), strict=True):
        if users:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            by_dtype.setdefault(p.grad.dtype, []).append(p.grad)
    for grads in by_dtype.values():
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= world()
        for grad, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(mean.view_as(grad))


def shard(transformer: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Share out the weights of the blocks among the processes (FSDP2)."""
    if not _running():
        raise ValueError(
            "shiva_ext: sharding='fsdp' wants several processes; start with 'accelerate launch' or torchrun"
        )
    from torch.distributed.fsdp import fully_shard

    for block in blocks:
        fully_shard(block)


@contextmanager
def unsharded(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """All weights of sharded blocks at once; plain blocks are left as they are."""
    sharded = [block for block in blocks if hasattr(block, "unshard")]
    for block in sharded:
        block.unshard()
    try:
        yield
    finally:
        for block in sharded:
            block.reshard()
