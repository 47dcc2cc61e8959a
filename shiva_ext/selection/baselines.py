"""Selectors without training, to compare a router with. They answer the same question: a score for every token."""

import torch
from torch import Tensor

_MASK = 2**64 - 1


def _mix(value: int) -> int:
    """The finaliser of splitmix64: a bijection of 64-bit integers that scatters neighbours."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class RandomSelector:
    """Random scores: a lower bound that a router must beat.

    The score is a hash of (seed, layer, sigma, row, token). There is no generator and hence no state: the order of the
    calls, the device and resuming do not matter, and torch's random numbers are left alone.

    Args:
        ratio: share of tokens to keep, in (0, 1].
        seed: of the hash.
    """

    def __init__(self, ratio: float, seed: int = 0):
        if not 0 < ratio <= 1:
            raise ValueError(f"RandomSelector: ratio is {ratio}, wanted a share above 0 and at most 1")
        self.ratio, self.seed = ratio, seed

    def scores(self, layer: int, x: Tensor, sigma: float) -> Tensor:
        """Scores in [0, 1).

        Args:
            layer: index of the block.
            x: [B,N,D], tokens at the block's entry; only the shape counts.
            sigma: noise level in [0, 1]; told apart to 2^-20.

        Returns:
            [B,N] float32.
        """
        B, N, _ = x.shape
        key = hash_keys(self.seed, layer, sigma)
        return (hash_rows(N, [_mix(key ^ row) for row in range(B)], x.device) >> 8).float() * 2**-24


def hash_keys(seed: int, layer: int, sigma: float) -> int:
    """64 pseudo-random bits of where a choice is made; noise levels are told apart to 2^-20."""
    return _mix(_mix(_mix(seed) ^ layer) ^ round(float(sigma) * 2**20))


def hash_rows(N: int, keys: list[int], device: torch.device) -> Tensor:
    """Pseudo-random integers below 2^32, int64 [len(keys), N], a row for each key."""
    # One fill for each row: a tensor made of a list would be copied to the GPU, and wait for it.
    value = torch.stack([torch.full((1,), key & 0xFFFFFFFF, device=device) for key in keys])
    return _scattered(value ^ _scattered(torch.arange(N, device=device)))


def _scattered(value: Tensor) -> Tensor:
    """The 32-bit integer hash "lowbias32" on int64 tensors, whose products must stay below 2^63."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        value = value ^ (value >> shift)
        high = (value * (factor >> 16) & 0xFFFF) << 16
        value = (value * (factor & 0xFFFF) + high) & 0xFFFFFFFF
    return value ^ (value >> 16)


class LargestNormSelector:
    """Scores a token by its Euclidean norm: the simplest heuristic.

    Args:
        ratio: share of tokens to keep, in (0, 1].
    """

    def __init__(self, ratio: float):
        if not 0 < ratio <= 1:
            raise ValueError(f"LargestNormSelector: ratio is {ratio}, wanted a share above 0 and at most 1")
        self.ratio = ratio

    def scores(self, layer: int, x: Tensor, sigma: float) -> Tensor:
        """Norms of x [B,N,D], as [B,N] float32 (float64 for float64 x); layer and sigma do not matter."""
        return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
