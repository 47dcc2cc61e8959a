"""Normalised feature distillation from the dense teacher."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def distilled_layers(num_layers: int, every: int = 4) -> tuple[int, ...]:
    """The blocks whose output is compared: every ``every``-th and the last, which stands for the final output.

    The paper asks for "every 4 transformer blocks" and the final output. We take the tokens after the last block for
    the latter: behind them comes a per-token projection to a patch's few channels, whose LayerNorm would only compare
    signs.
    """
    if num_layers < 1 or every < 1:
        raise ValueError(f"distilled_layers: num_layers is {num_layers} and every {every}, wanted at least 1 of each")
    return tuple(sorted({*range(every - 1, num_layers, every), num_layers - 1}))


def feature_distance(student: Tensor, teacher: Tensor, eps: float = 1e-6) -> Tensor:
    """Mean squared difference of two feature maps after a LayerNorm without affine part, in float32.

    One term of Shiva-DiT (arXiv 2602.05605), eq. 31, as a mean over batch, tokens and channels instead of a sum: it
    lies between 0 and 4 whatever the image size, the width and the scale of the features. Uncorrelated features give 2.

    Args:
        student: [B,N,D].
        teacher: [B,N,D], a constant.
        eps: of the LayerNorm.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"feature_distance: student has shape {tuple(student.shape)} and teacher {tuple(teacher.shape)}, "
            "wanted the same block's tokens of both"
        )
    D = student.shape[-1:]
    normed = F.layer_norm(student.float(), D, eps=eps)
    return F.mse_loss(normed, F.layer_norm(teacher.detach().float(), D, eps=eps))


def distillation_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], eps: float = 1e-6) -> Tensor:
    """Mean of :func:`feature_distance` over the compared blocks, float32, without axes.

    Args:
        student: outputs [B,N,D] of the blocks that :func:`distilled_layers` lists.
        teacher: the same blocks' outputs in the dense model.
        eps: of the LayerNorm.
    """
    if not 0 < len(student) == len(teacher):
        raise ValueError(
            f"distillation_loss: got {len(student)} student and {len(teacher)} teacher features, wanted equally many"
        )
    terms = [feature_distance(ours, theirs, eps) for ours, theirs in zip(student, teacher, strict=True)]
    return torch.stack(terms).mean()
