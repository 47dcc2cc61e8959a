"""ToMeSD: tokens that are alike are merged before a module and copied after it."""

from dataclasses import dataclass

from .base import ATTENTION, BlockCall, Method, SiteTokens
from .partition import MEAN, Partition, best_destination, partition, window_destinations


@dataclass(frozen=True)
class ToMeSD(Method):
    """Token merging for diffusion (arXiv 2303.17604; code github.com/dbolya/tomesd).

    In every window one token, drawn at random for the whole batch, is a destination; of the other tokens, those most
    alike to a destination are averaged into it. Anew in every block and step; no state.

    Attributes:
        ratio: share of the tokens to merge, in [0, 1); at most 1 - 1/window^2 of them can be.
        window: side of a window.
        random: draw the destinations, by a hash of (seed, layer, noise level); False takes the top left of each window,
            which a compiler needs: else it makes a graph for every step.
        sites: as published, around self-attention alone. Around both halves, or the block, it saves more.
        first_layer: blocks before it stay dense.
        seed: of the hash.
    """

    ratio: float = 0.5
    window: int = 2
    random: bool = True
    sites: tuple[str, ...] = (ATTENTION,)
    first_layer: int = 0
    seed: int = 0

    stateful = False

    def __post_init__(self):
        self._check()
        if self.window < 2:
            raise ValueError(f"{type(self).__name__}: window is {self.window}, wanted at least 2")

    def how(self, layer: int) -> str:
        """How a group's tokens become one, see :class:`Partition`."""
        return MEAN

    def num_merged(self, N: int, destinations: int) -> int:
        """Tokens to merge: int(N * ratio), but no destination."""
        return min(int(N * self.ratio), N - destinations)

    def tokens(self, layer: int, N: int, step: int, steps: int) -> SiteTokens:
        return self._site_tokens(layer, N, N - self.num_merged(N, N // self.window**2))

    def matching_flops(self, N: int, D: int) -> int:
        return 2 * N * (N // self.window**2) * D

    def run_block(self, call: BlockCall):
        groups = self.match(call)
        return call.dense() if groups is None else call.around(dict.fromkeys(self.sites, groups))

    def match(self, call: BlockCall) -> Partition | None:
        """The groups of this block, None if there is nothing to merge."""
        B, N, _ = call.x.shape
        key = (self.seed, call.layer, call.sigma) if self.random else None
        destinations = window_destinations(call.grid, self.window, B, key, call.x.device)
        r = self.num_merged(N, destinations.shape[1]) if destinations.shape[1] else 0
        if r == 0:
            return None
        return partition(*best_destination(call.x, destinations), r, self.how(call.layer))
