"""Settings of the ways to prune a vision transformer's patches."""

import operator
from dataclasses import dataclass


@dataclass(frozen=True)
class PatchConfig:
    """What all ways share.

    Attributes:
        keep: share of the patches that stays, above 0 and at most 1; where there are several layers, of those that are
            left.
        layers: blocks, from 0, after which patches go for good (for :class:`ShivaViTConfig` the blocks that work on
            the kept ones alone).
        seed: of what is drawn at random in eval mode: the same draw in every call, for the whole batch.
    """

    keep: float = 0.6
    layers: tuple[int, ...] = (2,)
    seed: int = 0

    def __post_init__(self):
        name = type(self).__name__
        try:
            object.__setattr__(self, "layers", tuple(operator.index(layer) for layer in self.layers))
        except TypeError as error:
            raise ValueError(f"{name}: layers is {self.layers!r}, wanted a sequence of whole numbers") from error
        if not 0 < self.keep <= 1:
            raise ValueError(f"{name}: keep is {self.keep}, wanted a share above 0 and at most 1")
        rising = all(a < b for a, b in zip(self.layers, self.layers[1:], strict=False))
        if not self.layers or not rising or self.layers[0] < 0:
            raise ValueError(f"{name}: layers is {self.layers}, wanted one or more blocks from 0 on, ascending")

    def scored(self) -> tuple[int, ...]:
        """Blocks that have a scoring head."""
        return self.layers

    def count(self, n: int) -> int:
        """How many of n patches stay: ``int(n keep)``, at least 1."""
        return max(1, int(n * self.keep))


@dataclass(frozen=True)
class TNTConfig(PatchConfig):
    """Training noise token pruning (arXiv 2411.18092), per its released code.

    In training nothing goes: after each of the sites' blocks a shared LayerNorm, then noise of the standard deviation
    ``noise (1 - a)`` on every patch, with a the softmax of its head's scores over the patches. In eval mode the patches
    of the largest a stay, and of those some that are like another one go.

    Attributes:
        similar: r, patches that go because they are like others: with one layer after its ``keep``, of ``k + r``; with
            several before the first block, whichever they are.
        sites: how many blocks, from the first, have a head and noise; ``layers`` must be among them.
        noise: standard deviation of the noise on a patch that does not matter.
        rescaled: ``1 - a / max a`` instead of ``1 - a``, which as released is nearly 1 for all patches.
        norm_in_eval: whether the LayerNorm is there in eval mode, too. As released it is not (False), so that the model
            that is tested is not the one that was trained.
    """

    similar: int = 0
    sites: int = 5
    noise: float = 0.02
    rescaled: bool = False
    norm_in_eval: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.similar < 0:
            raise ValueError(f"TNTConfig: similar is {self.similar}, wanted a number of patches")
        if not self.noise >= 0:
            raise ValueError(f"TNTConfig: noise is {self.noise}, wanted a standard deviation")
        if self.layers[-1] >= self.sites:
            raise ValueError(
                f"TNTConfig: layers is {self.layers}, wanted some of the first {self.sites} blocks, the sites, which "
                "have a head"
            )

    def scored(self) -> tuple[int, ...]:
        return tuple(range(self.sites))


@dataclass(frozen=True)
class DynamicViTConfig(PatchConfig):
    """DynamicViT (arXiv 2106.02034): in training patches are hidden by Gumbel draws, straight through.

    Every layer draws keep or drop for each patch that is left; who is dropped is still computed but seen by itself
    alone. ``handle.loss()`` is the mean square of the kept share less the one wanted. In eval mode the best ones stay.

    Attributes:
        tau: temperature of the Gumbel draws.
        ratio_weight: of the ratio loss.
    """

    tau: float = 1.0
    ratio_weight: float = 2.0

    def __post_init__(self):
        super().__post_init__()
        if not self.tau > 0:
            raise ValueError(f"DynamicViTConfig: tau is {self.tau}, wanted a temperature above 0")


@dataclass(frozen=True)
class ShivaViTConfig(PatchConfig):
    """Blocks work on the best patches; the others pass by, and may be chosen by the next block (arXiv 2602.05605).

    Attributes:
        layers: the blocks that do.
        estimator: of the gradient to the heads, see :func:`shiva_ext.selection.get_estimator`. The counterfactual one
            wants to know what the block would have done with the others: in training it runs on all, without gradients.
    """

    layers: tuple[int, ...] = (2, 3)
    estimator: str = "counterfactual"


@dataclass(frozen=True)
class RandomPatchConfig(PatchConfig):
    """Patches go at random: in training other ones in every call, for the whole batch.

    Attributes:
        pass_by: whether ``layers`` are blocks that the patches pass by, as :class:`ShivaViTConfig` has it.
    """

    pass_by: bool = False

    def scored(self) -> tuple[int, ...]:
        return ()


CONFIGS = {cls.__name__: cls for cls in (TNTConfig, DynamicViTConfig, ShivaViTConfig, RandomPatchConfig)}
