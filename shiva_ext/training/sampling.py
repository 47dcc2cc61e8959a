"""Stratified noise levels and ratios: evenly spread within every global batch, so that its means hardly vary."""

import hashlib

import torch
from torch import Tensor


def stratified_timesteps(
    batch_size: int, rank: int = 0, world: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """Noise levels of one part of a global batch: one from each of ``batch_size * world`` equal intervals.

    ``sigma_i ~ U(i / B, (i + 1) / B)``: Shiva-DiT (arXiv 2602.05605), eq. 15, with [0, T] scaled to [0, 1]. A part gets
    *adjacent* intervals, because the samples of one forward call share one ratio per layer, and the ratio is a function
    of the noise level.

    Args:
        batch_size: samples in this part.
        rank: index of the part: the process's rank, or with accumulation ``rank * steps + step``.
        world: number of parts: processes times accumulation steps.
        generator: of the positions within the intervals; need not agree between the parts.

    Returns:
        [batch_size] float32 in [0, 1), ascending.
    """
    if batch_size < 1 or not 0 <= rank < world:
        raise ValueError(
            f"stratified_timesteps: batch_size is {batch_size}, rank {rank} of world {world}, "
            "wanted at least one sample and a rank from 0 to world - 1"
        )
    interval = rank * batch_size + torch.arange(batch_size)
    sigma = (interval + torch.rand(batch_size, generator=generator, dtype=torch.float64)) / (batch_size * world)
    return sigma.float().clamp(max=1 - 2**-24)  # rounding to float32 may reach 1


def regional_timesteps(size: int, parts: int, regions: int, generator: torch.Generator | None = None) -> list[Tensor]:
    """Noise levels of the parts of a step, each part's from one of ``regions`` equal intervals.

    Each part gets another interval while there are enough, in random order; with as many intervals as parts they are
    :func:`stratified_timesteps` in their order.

    Args:
        size: samples of a part.
        parts: of a step, of all processes together.
        regions: intervals.
        generator: of all of it; the same on all processes.

    Returns:
        ``parts`` times [size] float32 in [0, 1), ascending.
    """
    if regions < 1:
        raise ValueError(f"regional_timesteps: regions is {regions}, wanted at least 1")
    if regions == parts:
        return [stratified_timesteps(size, i, parts, generator) for i in range(parts)]
    order = torch.cat([torch.randperm(regions, generator=generator) for _ in range(-(-parts // regions))])
    return [(int(r) + stratified_timesteps(size, generator=generator)) / regions for r in order[:parts]]


def stratified_ratios(
    groups: int, low: float = 0.3, high: float = 0.95, generator: torch.Generator | None = None
) -> Tensor:
    """One ratio for each group of a global batch, from disjoint intervals that together cover [low, high].

    Shiva-DiT (arXiv 2602.05605), section 3.5: the router's warm-up sees the whole range of budgets in every batch.
    The intervals are dealt out at random: groups have adjacent noise levels, and a fixed order would tie large ratios
    to large noise.

    Args:
        groups: K; a group is one forward call, which has one token count per layer.
        low, high: bounds of the ratio.
        generator: on several processes, seed it alike and let each process take its own groups' entries.

    Returns:
        [groups] float32.
    """
    if groups < 1 or not 0 < low < high <= 1:
        raise ValueError(
            f"stratified_ratios: groups is {groups}, low {low}, high {high}, wanted at least one group and 0 < low < "
            "high <= 1"
        )
    position = (torch.randperm(groups, generator=generator) + torch.rand(groups, generator=generator)) / groups
    return low + (high - low) * position


def shared_ratios(ratios: Tensor) -> Tensor:
    """The ratios that the samples of one forward call share: their mean, so that the budget's mean is unchanged.

    Args:
        ratios: [B,L], the policy's at each sample's noise level.

    Returns:
        [L], differentiable.
    """
    if ratios.ndim != 2:
        raise ValueError(f"shared_ratios: ratios has shape {tuple(ratios.shape)}, wanted [samples, layers]")
    return ratios.mean(dim=0)


def derive_seed(*place) -> int:
    """A seed of its own for each place in a training run, such as (seed, stage, step, part).

    Nothing random is carried from step to step, so a step is the same whoever computes it, and whenever.
    """
    name = "/".join(map(str, place)).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), "little")
