"""IBTM: what guidance changes most is important, and merged last."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..selection.baselines import hash_keys, hash_rows
from .base import ATTENTION, BlockCall, Method, SiteTokens
from .memory import RunMemory
from .partition import Partition, best_destination, partition

SPATIAL, COSINE = "spatial", "cosine"
_FIRST = 1e5  # above every similarity
_TIE_BREAK = 1e-5


@dataclass(frozen=True)
class IBTM(Method):
    """Importance-based token merging (arXiv 2411.16720; code github.com/cvlab-stonybrook/importance-token-merge).

    A token's importance is how much guidance moved it in the step before: the mean over channels of the difference
    between both predictions. Destinations are drawn from the most important tokens; the unimportant ones are merged
    first. Needs guidance with both halves in one batch, which then share their groups.

    Attributes:
        ratio: share of the tokens to merge, in [0, 1).
        pool: the important tokens that destinations come from are ``pool`` times those that stay; as published 1.4 for
            Stable Diffusion 2 and 1.0 for PixArt.
        destinations: share of the tokens that are destinations.
        similarity: "spatial" merges into the nearest destination in the image, as published for PixArt; "cosine" into
            the most alike.
        plain_steps: steps at the start that stay dense, at least the first: published are 2 of 50 and 4 of 20.
        sites: as published, around attention.
        first_layer, last_layer: the blocks that merge, both included; as published 7 to 20 of PixArt's 28. None is the
            last.
        seed: of the destinations, by a hash of (seed, layer, noise level).
    """

    ratio: float = 0.5
    pool: float = 1.0
    destinations: float = 0.25
    similarity: str = SPATIAL
    plain_steps: int = 2
    sites: tuple[str, ...] = (ATTENTION,)
    first_layer: int = 0
    last_layer: int | None = None
    seed: int = 0

    def __post_init__(self):
        self._check()
        if self.similarity not in (SPATIAL, COSINE):
            raise ValueError(f"IBTM: similarity is {self.similarity!r}, wanted {SPATIAL!r} or {COSINE!r}")
        if not 0 < self.destinations <= 1 - self.ratio:
            raise ValueError(
                f"IBTM: destinations is {self.destinations}, wanted a share above 0 and at most 1 - ratio, "
                f"{1 - self.ratio:.3g}: destinations are not merged"
            )
        if not self.pool > 0:
            raise ValueError(f"IBTM: pool is {self.pool}, wanted a positive number")
        if self.plain_steps < 1:
            raise ValueError(f"IBTM: plain_steps is {self.plain_steps}, wanted at least 1, to learn what is important")
        if self.last_layer is not None and self.last_layer < self.first_layer:
            raise ValueError(
                f"IBTM: last_layer is {self.last_layer}, before first_layer {self.first_layer}: no block would merge"
            )

    def _merges(self, layer: int) -> bool:
        return self.last_layer is None or layer <= self.last_layer

    def tokens(self, layer: int, N: int, step: int, steps: int) -> SiteTokens:
        merged = int(N * self.ratio) if self._merges(layer) and step >= self.plain_steps else 0
        return self._site_tokens(layer, N, N - merged)

    def finish(self, output: Tensor, guided: bool, grid: tuple[int, int], memory: RunMemory) -> None:
        if not guided:
            raise ValueError(
                "IBTM: importance is what guidance changes, wanted one batch of unconditional and conditional samples; "
                "guide the pipeline, or enable with batched_guidance=True"
            )
        if output.ndim != 4:
            raise ValueError(
                f"IBTM: the model returns {list(output.shape)}, wanted an image [B,C,H,W] to read importance from; "
                "this method is not for it"
            )
        unprompted, prompted = output.detach().float().chunk(2)
        change = (prompted - unprompted).abs().mean(dim=1, keepdim=True)
        memory.set("importance", value=F.adaptive_avg_pool2d(change, grid).flatten(1))

    def matching_flops(self, N: int, D: int) -> int:
        return 2 * N * int(self.destinations * N) * (2 if self.similarity == SPATIAL else D)

    def run_block(self, call: BlockCall):
        importance = call.memory.get("importance")
        r = int(call.x.shape[1] * self.ratio)
        if importance is None or call.memory.step < self.plain_steps or not self._merges(call.layer) or r == 0:
            return call.dense()
        groups = self.match(call.x, importance, r, call.grid, hash_keys(self.seed, call.layer, call.sigma))
        return call.around(dict.fromkeys(self.sites, groups))

    def match(self, x: Tensor, importance: Tensor, r: int, grid: tuple[int, int], key: int) -> Partition:
        """Groups of x [B,N,D] by the importance [B/2,N] of both halves' tokens."""
        N = x.shape[1]
        important = min(N, max(1, int((N - r) * self.pool)))
        pool, rest = ops.topk_select(importance, important)
        drawn = hash_rows(N, [key], x.device).float().expand_as(importance)
        drawn = torch.full_like(drawn, -torch.inf).scatter(1, pool, drawn.gather(1, pool))
        count = min(max(1, int(self.destinations * N)), important)
        destinations = ops.topk_select(drawn, count)[0].repeat(2, 1)
        if self.similarity == COSINE:
            score, nearest = best_destination(x, destinations)
        else:
            score, nearest = _nearest(grid, destinations)
            # Whole distances are often equal: as published, a little noise decides, the same for both halves.
            score = score + _TIE_BREAK * hash_rows(N, [key + 1], x.device).float() / 2**32
        # Those outside the pool go first.
        return partition(
            score.scatter_add(1, rest.repeat(2, 1), score.new_full((1, 1), _FIRST).expand(len(x), N)), nearest, r
        )


def _nearest(grid: tuple[int, int], destinations: Tensor) -> tuple[Tensor, Tensor]:
    """Minus the distance in the image to each token's nearest destination (-inf for those), and which it is."""
    place = torch.arange(grid[0] * grid[1], device=destinations.device)
    place = torch.stack([place // grid[1], place % grid[1]], dim=-1).float()
    distance, index = torch.cdist(place.expand(len(destinations), -1, -1), place[destinations]).min(dim=-1)
    return (-distance).scatter(1, destinations, -torch.inf), destinations.gather(1, index)
