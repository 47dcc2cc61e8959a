"""Which visual tokens a language model keeps, from which layer on."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """Before this layer, keep some of the visual tokens that are left.

    Attributes:
        layer: index of the first layer that sees the kept ones alone; at least 1.
        share: of those that are left, rounded down, by score.
        stride: also keep every so manieth of each image's rows and columns; 0 for none.
    """

    layer: int
    share: float
    stride: int = 0


@dataclass(frozen=True)
class FeatherConfig:
    """FEATHER (arXiv 2412.13180): two stages, scored without RoPE, the first one joined with a uniform grid.

    Attributes:
        ratio: R, what is removed: stage i keeps ``(1 - R)^i`` of what is left.
        layers: of the stages.
        stride: of the first stage's grid; 0 for none. 3 of 27 x 27 tokens are 81.
        grid: rows and columns of an image's tokens; by default their number is a square.
        rope: whether the score sees the positions, as FastV's does.
    """

    ratio: float = 0.7
    layers: tuple[int, ...] = (8, 16)
    stride: int = 3
    grid: tuple[int, int] | None = None
    rope: bool = False

    def __post_init__(self):
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio, the share that is removed, must lie in [0, 1), got {self.ratio}")
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 1:
            raise ValueError(f"layers must be ascending and at least 1, got {self.layers}")
        if self.stride < 0:
            raise ValueError(f"stride must not be negative, got {self.stride}")

    def stages(self) -> list[Stage]:
        """The stages in the order of their layers; none at a ratio of 0, which removes nothing."""
        if self.ratio == 0:
            return []
        kept = 1 - self.ratio
        return [
            Stage(layer, kept**number, self.stride if number == 1 else 0) for number, layer in enumerate(self.layers, 1)
        ]


@dataclass(frozen=True)
class FastVConfig:
    """FastV (arXiv 2403.06764): once, by the attention that the last token of the prompt pays in the layer before.

    Attributes:
        ratio: R, what is removed.
        layer: K; layers 0 to K - 1 see all tokens.
    """

    ratio: float = 0.75
    layer: int = 3

    def __post_init__(self):
        self.feather()  # which refuses wrong values

    def feather(self) -> FeatherConfig:
        """The same as a setting of FEATHER's code: one stage, no grid, positions and all keys in the score."""
        return FeatherConfig(self.ratio, (self.layer,), stride=0, rope=True)


def grid_tokens(rows: int, columns: int, stride: int) -> list[int]:
    """Every s-th row and column of an image, as token indices: ``ceil(rows / s) ceil(columns / s)`` of them."""
    return [row * columns + column for row in range(0, rows, stride) for column in range(0, columns, stride)]


def expected_union(tokens: int, top: int, grid: int) -> float:
    """How many tokens the best ``top`` and a grid have together, if they do not depend on each other."""
    return top + grid - top * grid / tokens


def flops_reduction(tokens: list[float], lengths: list[int], width: int, inner: int) -> float:
    """The share of a language model's operations that pruning saves (the paper's model of a layer).

    ``C(n) = 4 n d^2 + 2 n^2 d + 2 n d m`` for n tokens; the printed equation leaves out the number of layers below the
    fraction.

    Args:
        tokens: in each group of layers, the first being the unpruned number.
        lengths: how many layers each group has.
        width, inner: d and m.
    """

    def cost(n: float) -> float:
        return 4 * n * width**2 + 2 * n**2 * width + 2 * n * width * inner

    spent = sum(length * cost(n) for n, length in zip(tokens, lengths, strict=True))
    return 1 - spent / (sum(lengths) * cost(tokens[0]))


def square(tokens: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of an image of so many tokens.

    Raises:
        ValueError: the grid has another number of tokens, or there is none and the number is no square.
    """
    if grid is not None:
        if grid[0] * grid[1] != tokens:
            raise ValueError(f"grid is {grid[0]} x {grid[1]}, but the images have {tokens} tokens each")
        return grid
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"the images have {tokens} tokens each, which is no square; give grid=(rows, columns)")
    return side, side
