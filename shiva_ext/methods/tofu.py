"""Token Fusion: early blocks drop what later blocks would merge."""

from dataclasses import dataclass

from .partition import KEEP, MLERP
from .tomesd import ToMeSD


@dataclass(frozen=True)
class ToFu(ToMeSD):
    """Token Fusion (arXiv 2312.01026); no official code was found, it follows a description of the paper.

    ToMeSD's matching. In the first ``depth`` blocks a group is its destination alone; later it is the mean's direction
    with the largest norm of the group, so that averaging does not shrink it.

    Attributes:
        depth: first block that averages. The paper gives 6 of 12 for ViT-B and none for diffusion transformers; half
            the blocks is our choice, and there is no default: 12 for SD3.5-Medium, 14 for PixArt and DiT-XL.
    """

    depth: int = -1

    def __post_init__(self):
        super().__post_init__()
        if self.depth < 0:
            raise ValueError(
                f"ToFu: depth is {self.depth}, wanted the first block that averages, such as half the model's blocks"
            )

    def how(self, layer: int) -> str:
        return KEEP if layer < self.depth else MLERP
