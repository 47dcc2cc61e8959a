"""SDTM: structure first, then detail: where and how much is merged follows the run."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..selection.baselines import hash_keys, hash_rows
from .base import ATTENTION, MLP, BlockCall, Method, SiteTokens
from .memory import RunMemory
from .partition import Partition, best_destination, partition, window_of_tokens

_WINDOW = 2


@dataclass(frozen=True)
class _Remembering:
    """Stores a module's output for all tokens: a full step."""

    memory: RunMemory
    key: tuple
    leaders: None = None

    def of_module(self, index: int) -> "_Remembering":
        return replace(self, key=(*self.key, index))

    def merge(self, x: Tensor) -> Tensor:
        return x

    def unmerge(self, y: Tensor) -> Tensor:
        self.memory.set(*self.key, value=y.detach())
        return y


@dataclass(frozen=True)
class _Blended:
    """Merged tokens get a little of their group's output, and mostly their own of the last full step."""

    groups: Partition
    share: float
    memory: RunMemory
    key: tuple

    def of_module(self, index: int) -> "_Blended":
        return replace(self, key=(*self.key, index))

    @property
    def leaders(self) -> Tensor:
        return self.groups.leaders

    def merge(self, x: Tensor) -> Tensor:
        return self.groups.merge(x)

    def unmerge(self, y: Tensor) -> Tensor:
        spread = self.groups.unmerge(y)
        before = self.memory.get(*self.key)
        if before is None:
            return spread
        merged = self.groups.merged
        own = ops.token_gather(before, merged)
        return ops.token_scatter(spread, merged, torch.lerp(own, ops.token_gather(spread, merged), self.share))


@dataclass(frozen=True)
class SDTM(Method):
    """Structure-then-detail token merging (arXiv 2505.11707; code github.com/ICTMCG/SDTM, without attention maps).

    Early in the run (structure) the 2 x 2 windows whose tokens are most alike become one token each, around attention
    and MLP. Later (detail) single tokens are merged around the MLP alone, into the token of their window that was
    merged the longest. Every ``full_every``-th step is dense, and refreshes what merged tokens are blended with.

    Attributes:
        ratio: share of the tokens to merge: it falls by a cosine from ratio + swing to ratio - swing, with a mean of
            ratio + .27 swing (full steps left out). As published .3.
        swing: as published .2.
        switch: share of the steps that are structure; as published .4.
        structure_weight: of the age term in the structure's score: windows whose tokens have been merged for long
            come first. As published .05, with the sign of the published code.
        blend: share of the merged output in what a merged token gets; the rest is its own output of the last full
            step. As published .1; 1 caches nothing.
        full_every: steps from one full step to the next; as published 3.
        first_layer: blocks before it stay dense.
        seed: of the windows' leaders, by a hash of (seed, layer, noise level).

    How long a token has been merged is counted in each block, and every group's leader begins anew; the published code
    leaves both open. The cache holds two tensors [B,N,D] a block. Left out, as there: reweighting by the prompt.
    """

    ratio: float = 0.3
    swing: float = 0.2
    switch: float = 0.4
    structure_weight: float = 0.05
    blend: float = 0.1
    full_every: int = 3
    first_layer: int = 0
    seed: int = 0

    sites = (ATTENTION, MLP)

    def __post_init__(self):
        self._check()
        if not 0 <= self.swing <= min(self.ratio, 1 - self.ratio):
            raise ValueError(
                f"SDTM: swing is {self.swing}, wanted at least 0 and such that ratio - swing and ratio + swing are in "
                f"[0, 1] (ratio is {self.ratio})"
            )
        for name in ("blend", "switch"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"SDTM: {name} is {getattr(self, name)}, wanted a share in [0, 1]")
        if self.full_every < 1:
            raise ValueError(f"SDTM: full_every is {self.full_every}, wanted at least 1 (every step is full)")

    def ratio_at(self, progress: float) -> float:
        """Share of the tokens to merge: (ratio - swing) + 2 swing cos(pi progress / 2)."""
        return self.ratio - self.swing + 2 * self.swing * math.cos(math.pi * progress / 2)

    def _is_structure(self, progress: float) -> bool:
        return progress < self.switch

    def num_merged(self, N: int, progress: float) -> int:
        """Tokens to merge: whole windows of three while structure, at most three of four later."""
        r = min(int(N * self.ratio_at(progress)), N * 3 // 4)
        return round(r / 3) * 3 if self._is_structure(progress) else r

    def tokens(self, layer: int, N: int, step: int, steps: int) -> SiteTokens:
        if layer < self.first_layer or step % self.full_every == 0:
            return SiteTokens(N, N)
        progress = step / steps
        M = N - self.num_merged(N, progress)
        return SiteTokens(M if self._is_structure(progress) else N, M)

    def matching_flops(self, N: int, D: int) -> int:
        """Of a detail step; those of structure are as many as norms, which are not counted."""
        return 2 * N * (N // 4) * D

    def run_block(self, call: BlockCall):
        keys = {site: ("output", call.layer, site) for site in self.sites}
        if call.memory.step % self.full_every == 0:
            if self.blend == 1:
                return call.dense()
            return call.around({site: _Remembering(call.memory, key) for site, key in keys.items()})
        groups = self.match(call)
        if groups is None:
            return call.dense()
        sites = self.sites if self._is_structure(call.progress) else (MLP,)
        return call.around({s: _Blended(groups, self.blend, call.memory, keys[s]) for s in sites})

    def match(self, call: BlockCall) -> Partition | None:
        """The groups of this block, None if there is nothing to merge; counts how long each token has been merged."""
        B, N, _ = call.x.shape
        windows = window_of_tokens(call.grid, _WINDOW, call.x.device)
        r = min(self.num_merged(N, call.progress), 3 * len(windows))
        if r == 0:
            return None
        key = ("merged for", call.layer)
        age = call.memory.get(*key)
        age = torch.zeros(B, N, device=call.x.device) if age is None else age
        find = self._structure if self._is_structure(call.progress) else self._detail
        groups = find(call, windows, age, r)
        call.memory.set(*key, value=(age + 1).scatter(1, groups.leaders, 0.0))
        return groups

    def _structure(self, call: BlockCall, windows: Tensor, age: Tensor, r: int) -> Partition:
        """The most alike windows become one token each."""
        B, N, _ = call.x.shape
        W, n = windows.shape
        unit = F.normalize(call.x.float(), dim=-1)
        total = unit[:, windows].sum(dim=2)  # the cosines of all pairs sum to its square
        alike = (total.square().sum(dim=-1) - n) / (n * (n - 1))
        turn = age / age.mean(dim=1, keepdim=True).clamp_min(1e-6)
        collapsed = ops.topk_select(alike + self.structure_weight * turn[:, windows].mean(dim=2), r // 3)[0]
        drawn = hash_rows(W, [hash_keys(self.seed, call.layer, call.sigma)], call.x.device)[0] % n
        leader = windows.gather(1, drawn[:, None])  # [W,1]
        goes = torch.zeros(B, W, 1, device=call.x.device).scatter(1, collapsed[..., None], 1.0).expand(B, W, n)
        score = torch.full((B, N), -torch.inf, device=call.x.device)
        score = score.scatter(1, windows.flatten().expand(B, -1), torch.where(goes > 0, 1.0, -torch.inf).flatten(1))
        score = score.scatter(1, leader.T.expand(B, -1), -torch.inf)
        nearest = torch.arange(N, device=call.x.device)
        nearest = nearest.scatter(0, windows.flatten(), leader.expand(W, n).flatten()).expand(B, -1)
        return partition(score, nearest, r)

    def _detail(self, call: BlockCall, windows: Tensor, age: Tensor, r: int) -> Partition:
        """Tokens join the one that they are most alike to, among those that were merged the longest."""
        B = len(call.x)
        oldest = age[:, windows].argmax(dim=-1)  # [B,W]
        destinations = windows.expand(B, -1, -1).gather(2, oldest[..., None])[..., 0].sort(dim=1).values
        return partition(*best_destination(call.x, destinations), r)
