"""Quality metrics of generated images, in plain torch and float64 where it matters."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

# Fashion-MNIST's background is exactly -1, but a sampler leaves noise on it: in the padding frame of 60 generated
# images 99 % of the pixels were within 0.06 of -1. At 0.1 (13 of 255 grey levels) 0.3 % of the frame's tokens pass for
# foreground (44 % at half a grey level), and real images keep 90 % of the tokens that hold any pixel above -1.
FOREGROUND_MARGIN = 0.1


def _check_features(name: str, features: torch.Tensor, fewest: int) -> torch.Tensor:
    if features.ndim != 2:
        raise ValueError(f"{name}: features must be [M, F], got shape {list(features.shape)}")
    if len(features) < fewest:
        raise ValueError(f"{name}: at least {fewest} samples are needed, got {len(features)}")
    if not torch.isfinite(features).all():
        raise ValueError(f"{name}: features must be finite, got NaN or infinity; look at the images they came from")
    return features.double()


def gaussian(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance (unbiased) of features.

    Args:
        features: floating [M, F], M >= 2.

    Returns:
        mean, float64 [F]; covariance, float64 [F, F].

    Raises:
        ValueError: fewer than two samples, another shape, or values that are not finite.
    """
    features = _check_features("gaussian", features, 2)
    centred = features - features.mean(0)
    return features.mean(0), centred.T @ centred / (len(features) - 1)


def square_root(covariance: torch.Tensor) -> torch.Tensor:
    """The symmetric root of a covariance [F,F]; what rounding made negative counts as zero."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def frechet_distance(
    mean: torch.Tensor, covariance: torch.Tensor, other_mean: torch.Tensor, other_covariance: torch.Tensor
) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians, the formula of FID (Heusel et al. 2017).

    ``|m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1^.5 C2 C1^.5)^.5)``. The last trace is the sum of the singular values of
    ``C1^.5 C2^.5``: unlike the square root of the product ``C1 C2`` it needs no complex numbers and no jitter, and it
    stays exact when a covariance is singular (fewer samples than features, or a feature that never fires).

    Args:
        mean, other_mean: floating [F].
        covariance, other_covariance: floating [F, F], symmetric positive semi-definite.

    Returns:
        The distance, computed in float64, never negative.

    Raises:
        ValueError: shapes that do not belong together, or values that are not finite.
    """
    tensors = dict(mean=mean, covariance=covariance, other_mean=other_mean, other_covariance=other_covariance)
    (F,) = mean.shape if mean.ndim == 1 else (-1,)
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != ((F,) if name.endswith("mean") else (F, F)):
            raise ValueError(
                "frechet_distance: means must be [F] and covariances [F, F] with the same F, got "
                + ", ".join(f"{key} {list(value.shape)}" for key, value in tensors.items())
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"frechet_distance: {name} must be finite, got NaN or infinity")
    mean, covariance, other_mean, other_covariance = (tensor.double() for tensor in tensors.values())
    overlap = torch.linalg.svdvals(square_root(covariance) @ square_root(other_covariance)).sum()
    distance = (mean - other_mean).square().sum() + covariance.trace() + other_covariance.trace() - 2 * overlap
    return max(0.0, distance.item())


class PrecisionRecall(NamedTuple):
    """Share of generated samples inside the real manifold, and of real samples inside the generated one."""

    precision: float
    recall: float


def _distances(samples: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    # The matrix-product form loses the small distances between near-duplicates to cancellation.
    return torch.cdist(samples, centres, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(features: torch.Tensor, k: int) -> torch.Tensor:
    """Distance of each sample to its k-th nearest neighbour, itself not counted. [M]"""
    return torch.cat([_distances(part, features).kthvalue(k + 1, dim=1).values for part in features.split(1024)])


def _share_inside(samples: torch.Tensor, centres: torch.Tensor, radii: torch.Tensor) -> float:
    inside = [(_distances(part, centres) <= radii).any(1) for part in samples.split(1024)]
    return torch.cat(inside).double().mean().item()


def precision_recall(real: torch.Tensor, generated: torch.Tensor, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, eq. 1-2).

    A manifold is the union of the balls around its samples that just reach their k-th nearest neighbour. Both values
    depend on the number of samples: compare rows of equal M only.

    Args:
        real: floating [R, F], R > k.
        generated: floating [M, F], M > k.
        k: the neighbour that sets the radius; the paper's is 3.

    Raises:
        ValueError: too few samples, different F, or values that are not finite.
    """
    real = _check_features("precision_recall", real, k + 1)
    generated = _check_features("precision_recall", generated, k + 1)
    if real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"precision_recall: real and generated must have as many features, got {real.shape[1]} and "
            f"{generated.shape[1]}"
        )
    return PrecisionRecall(
        _share_inside(generated, real, _radii(real, k)), _share_inside(real, generated, _radii(generated, k))
    )


def psnr(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image to its reference, both clamped to [-1, 1] first (peak 2).

    Args:
        images, reference: floating [B, ...] of the same shape.

    Returns:
        decibels, float64 [B]; infinite where the two are equal.

    Raises:
        ValueError: shapes differ or pixels are not finite.
    """
    if images.shape != reference.shape:
        raise ValueError(
            f"psnr: images and reference must have one shape, got {list(images.shape)} and {list(reference.shape)}"
        )
    if not (torch.isfinite(images).all() and torch.isfinite(reference).all()):
        raise ValueError("psnr: pixels must be finite, got NaN or infinity")
    error = (images.double().clamp(-1, 1) - reference.double().clamp(-1, 1)).square()
    return 10 * torch.log10(4 / error.flatten(1).mean(1))


def ssim(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004) of each image to its reference, by torchmetrics.

    Both are clamped to [-1, 1] first.

    Args:
        images, reference: floating [B,C,H,W] of the same shape, at least 11 x 11 pixels.

    Returns:
        float32 [B], 1 where the two are equal.

    Raises:
        ImportError: torchmetrics is missing.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise ImportError("shiva_ext: SSIM needs torchmetrics; pip install 'shiva_ext[eval]'") from error
    images, reference = (each.float().clamp(-1, 1) for each in (images, reference))
    return structural_similarity_index_measure(images, reference, data_range=2.0, reduction="none").reshape(-1)


def bootstrap_distances(
    features: torch.Tensor,
    mean: torch.Tensor,
    covariance: torch.Tensor,
    draws: int = 100,
    seed: int = 0,
    labels: torch.Tensor | None = None,
) -> list[float]:
    """:func:`frechet_distance` to a Gaussian for resamples of the samples.

    The same seed and number of samples draw the same rows, so that two methods' samples from the same noise are
    resampled together. A resample repeats samples, which lowers its covariance's rank and raises the distance itself:
    take the deviation of these numbers or of their differences, not their quantiles.

    Args:
        features: floating [M,F] of the samples.
        mean, covariance: of the other distribution.
        draws: resamples of M.
        seed: of the resampling.
        labels: int64 [M], what was asked for. Samples are then drawn among those of the same label: how many there are
            of each was no chance. With fewer than ten of a label that would hide their spread, and they are drawn
            among all.
    """
    generator = torch.Generator().manual_seed(seed)
    strata = [torch.arange(len(features))]
    if labels is not None and labels.unique(return_counts=True)[1].min() >= 10:
        strata = [torch.nonzero(labels == label)[:, 0] for label in labels.unique()]
    found = []
    for _ in range(draws):
        rows = torch.cat([own[torch.randint(len(own), (len(own),), generator=generator)] for own in strata])
        found.append(frechet_distance(*gaussian(features[rows]), mean, covariance))
    return found


def class_accuracy(predicted: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of samples that the classifier takes for the class they were asked to be.

    Args:
        predicted, labels: int64 [M], M >= 1.

    Raises:
        ValueError: shapes differ or there are no samples.
    """
    if predicted.shape != labels.shape or predicted.ndim != 1 or len(labels) == 0:
        raise ValueError(
            f"class_accuracy: predicted and labels must be [M] with M >= 1, got {list(predicted.shape)} and "
            f"{list(labels.shape)}"
        )
    return (predicted == labels).double().mean().item()


def foreground_tokens(images: torch.Tensor, patch_size: int = 2, margin: float = FOREGROUND_MARGIN) -> torch.Tensor:
    """Tokens that show something: any pixel of the patch is above background.

    Args:
        images: floating [B, C, H, W], background -1, H and W multiples of the patch size.
        patch_size: edge of a patch in pixels.
        margin: how far above -1 a pixel must be.

    Returns:
        bool [B, N], N = (H / patch_size) * (W / patch_size), row by row as SD3's patch embedding orders tokens.

    Raises:
        ValueError: another shape, or pixels that are not finite.
    """
    if images.ndim != 4 or images.shape[-2] % patch_size or images.shape[-1] % patch_size:
        raise ValueError(
            f"foreground_tokens: images must be [B, C, H, W] with H and W multiples of {patch_size}, "
            f"got {list(images.shape)}"
        )
    if not torch.isfinite(images).all():
        raise ValueError("foreground_tokens: pixels must be finite, got NaN or infinity")
    brightest = torch.nn.functional.max_pool2d(images.float().amax(1, keepdim=True), patch_size)
    return brightest.flatten(1) > -1 + margin


@dataclass
class ForegroundRecall:
    """Kept-token recall of the foreground: kept foreground tokens / all foreground tokens.

    The ratio is taken over a whole batch for each (step, layer), and averaged over those, so that a picture without any
    foreground token needs no special case and every (step, layer) weighs the same. Random choice scores the kept ratio.
    """

    total: float = 0.0
    terms: int = 0

    def add(
        self,
        images: torch.Tensor,
        steps: list[dict[int, torch.Tensor]],
        dense_layers: Iterable[int] = (),
        patch_size: int = 2,
    ) -> None:
        """Count one batch.

        Args:
            images: the finished images, floating [B, C, H, W] in [-1, 1].
            steps: one dict a denoising step, from layer to the kept indices int64 [B, k]; or [2B, k], as batched
                guidance makes them, of which the second (prompted) half is taken.
            dense_layers: layers that count as fully kept in the steps that do not name them; for a schedule that leaves
                some layers dense at some steps.
            patch_size: edge of a patch in pixels.

        Raises:
            ValueError: the number of rows is neither B nor 2B, or an index is out of range.
        """
        foreground = foreground_tokens(images, patch_size)
        B, N = foreground.shape
        for kept_by_layer in steps:
            dense = len(set(dense_layers) - set(kept_by_layer)) if foreground.any() else 0
            self.total, self.terms = self.total + dense, self.terms + dense
            for layer, kept in kept_by_layer.items():
                if kept.ndim != 2 or kept.shape[0] not in (B, 2 * B):
                    raise ValueError(
                        f"ForegroundRecall: kept of layer {layer} must be [{B}, k] or [{2 * B}, k] for {B} images, "
                        f"got {list(kept.shape)}"
                    )
                if kept.numel() and not 0 <= kept.min() <= kept.max() < N:
                    raise ValueError(f"ForegroundRecall: kept of layer {layer} has indices outside 0..{N - 1}")
                if foreground.any():
                    hits = foreground.gather(1, kept[-B:].long()).sum()
                    self.total += (hits / foreground.sum()).item()
                    self.terms += 1

    @property
    def value(self) -> float | None:
        """The recall in [0, 1], or None if nothing was pruned or nothing was foreground."""
        return self.total / self.terms if self.terms else None
