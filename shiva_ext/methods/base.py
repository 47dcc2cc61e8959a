"""What a method that does more than choose tokens is made of."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from .memory import RunMemory

ATTENTION, MLP, BLOCK = "attention", "mlp", "block"
MLP_NORM = "mlp_norm"  # the norm before the MLP: what comes to it is the block's tokens after attention


class Merge(Protocol):
    """Fewer tokens for a module, and its output for all of them again."""

    # [B,M]: the tokens whose places (and rotary positions) the merged ones take, ascending; None merges nothing
    leaders: Tensor | None

    def merge(self, x: Tensor) -> Tensor:
        """[B,N,D] to [B,M,D]."""

    def unmerge(self, y: Tensor) -> Tensor:
        """[B,M,D] to [B,N,D]."""

    # Optional: of_module(index) -> Merge, for one that must tell apart the modules of a site (SD3.5's two attentions).


class SiteTokens(NamedTuple):
    """Tokens that the two halves of a block process."""

    attention: int
    mlp: int


def site_tokens(sites: tuple[str, ...], N: int, M: int) -> SiteTokens:
    """M tokens at these sites, N elsewhere."""
    return SiteTokens(*(M if BLOCK in sites or site in sites else N for site in (ATTENTION, MLP)))


@dataclass
class BlockCall:
    """One call of one block, as a method sees it.

    Attributes:
        layer: index of the block.
        kind: name of its class.
        x: [B,N,D], image tokens at its entry.
        sigma: noise level in [0, 1].
        progress: share of the run's steps that are done, in [0, 1); from the noise level where no scheduler tells.
        grid: height and width of the image in tokens; None where the method does without.
        guided: whether the batch is (unconditional, conditional).
        memory: of the run.
        run: ``run(tokens, kept)``: the block itself on these tokens, see :meth:`ModelAdapter.call`.
        plan: what the modules of the block read: site to :class:`Merge`, or to what runs in the module's place,
            ``replacement(module, forward, tokens, ...)``.
        tokens_of, replaced: read and replace the image tokens in a block's output.
        record: takes the indices [B,M] of the tokens that stay independent, and at which sites.
        conditioning: embeddings of the step and the prompt, see :class:`shiva_ext.models.Conditioning`.
        weights: of a method that is trained, else None.
        scratch: a dict for this call of the transformer, shared by its blocks.
        training: whether gradients are wanted.
        skipped: layers that do not run in this call.
    """

    layer: int
    kind: str
    x: Tensor
    sigma: float
    progress: float
    grid: tuple[int, int] | None
    guided: bool
    memory: RunMemory
    run: Callable
    plan: dict[str, Merge | Callable]
    tokens_of: Callable
    replaced: Callable
    record: Callable[[Tensor, tuple[str, ...]], None]
    conditioning: object = None
    weights: nn.Module | None = None
    scratch: dict = field(default_factory=dict)
    training: bool = False
    skipped: tuple[int, ...] = ()

    def dense(self):
        """The block on all its tokens."""
        return self.run(self.x)

    def around(self, merges: Mapping[str, Merge]):
        """The block with its attention or MLP, or (:data:`BLOCK`) all of it, on merged tokens.

        Around a module the tokens are merged as they come to it, normalised and modulated, and its output is spread to
        all tokens before the residual sum. Around the block they are merged at its entry, and what it adds to them is
        spread: x + unmerge(block(m) - m), m = merge(x).
        """
        merging = {site: merge.leaders for site, merge in merges.items() if merge.leaders is not None}
        if merging:
            self.record(next(iter(merging.values())), tuple(merging))
        if BLOCK not in merges:
            return self.with_plan(merges)
        merge = merges[BLOCK]
        merged = merge.merge(self.x)
        output = self.run(merged, merge.leaders)
        update = self.tokens_of(output).to(self.x.dtype) - merged
        return self.replaced(output, self.x + merge.unmerge(update))

    def with_plan(self, plan: Mapping[str, Merge | Callable], x: Tensor | None = None):
        """The block on tokens x, by default all, with its modules as planned."""
        self.plan.update(plan)
        try:
            return self.run(self.x if x is None else x)
        finally:
            self.plan.clear()


class Method(ABC):
    """A method by itself: its settings, and what it does to a block.

    A subclass is a frozen dataclass. It is a source for :func:`shiva_ext.enable`.

    Attributes:
        first_layer: blocks before it stay dense.
        sites: where tokens are merged: "attention", "mlp", or "block" for both with one merge at the entry.
        stateful: whether it carries tensors from step to step, so that its model cannot be compiled.
        needs_grid: whether rows and columns of the image matter to it.
    """

    stateful = needs_grid = True

    first_layer: int
    sites: tuple[str, ...]

    @property
    def whole_modules(self) -> bool:
        """Whether a block's attention and MLP are called with all tokens, and merge them inside, if at all."""
        return BLOCK not in self.sites

    @abstractmethod
    def run_block(self, call: BlockCall):
        """Run one block."""

    @abstractmethod
    def tokens(self, layer: int, N: int, step: int, steps: int) -> SiteTokens:
        """How many of N tokens a block's attention and MLP process at a step of so many."""

    @abstractmethod
    def matching_flops(self, N: int, D: int) -> int:
        """Matrix products of one merging block that the block itself would not need, for N tokens of D channels."""

    def finish(self, output: Tensor, guided: bool, grid: tuple[int, int], memory: RunMemory) -> None:
        """The transformer gave this output; for methods that learn from it."""
        return None

    def _check(self) -> None:
        ratio = self.ratio
        if not 0 <= ratio < 1:
            raise ValueError(
                f"{type(self).__name__}: ratio is {ratio}, wanted a share of the tokens to merge in [0, 1)"
            )
        wrong = [site for site in self.sites if site not in (ATTENTION, MLP, BLOCK)]
        if wrong or not self.sites or (BLOCK in self.sites and len(self.sites) > 1):
            raise ValueError(
                f"{type(self).__name__}: sites is {self.sites}, wanted ('attention',), ('mlp',), both, or ('block',)"
            )
        if self.first_layer < 0:
            raise ValueError(f"{type(self).__name__}: first_layer is {self.first_layer}, wanted at least 0")

    def _site_tokens(self, layer: int, N: int, M: int) -> SiteTokens:
        """M tokens at the method's sites, N elsewhere."""
        if layer < self.first_layer:
            return SiteTokens(N, N)
        return site_tokens(self.sites, N, M)
