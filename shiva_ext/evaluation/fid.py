"""FID through torch-fidelity's network."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .image_metric import IMAGES, Batch, ImageMetric, Measured, brief, fingerprint, read_picture, resamples, unavailable
from .metrics import frechet_distance, gaussian, square_root


def inception(weights: str | None) -> nn.Module:
    """The Inception network of FID, by torch-fidelity: uint8 [B,3,H,W] of any size to a tuple of features [B,2048].

    Raises:
        ImportError: torch-fidelity is missing, or a torchvision that fits torch, without which it cannot be imported.
        FileNotFoundError, ValueError: its weights are missing or other ones.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"shiva_ext: the metric 'fid' needs torch-fidelity and the torchvision that fits torch {torch.__version__} "
            f"({brief(error)}); pip install 'shiva_ext[fid]', with torchvision from where torch came"
        ) from error
    what = "the Inception weights of torch-fidelity"
    if weights is not None and not Path(weights).is_file():
        raise unavailable("fid", what, FileNotFoundError(f"there is no file {weights}"))
    try:
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights)
    except OSError as error:  # also what a failed download raises
        raise unavailable("fid", what, error) from error
    except Exception as error:  # whatever torch.load makes of another file
        raise ValueError(
            f"shiva_ext: {weights} does not hold {what} ({brief(error)}); take the file that "
            "torch-fidelity downloads, weights-inception-2015-12-05-6726825d.pth"
        ) from error


class Fid(ImageMetric):
    """Fréchet distance to real pictures in Inception's features (arXiv 1706.08500).

    Both sides go through torch-fidelity's network, which resizes them as the original does. The real side is computed
    once, and kept. With fewer pictures than features the distance is much too large: compare equal numbers only.

    Args:
        weights: file of the network's weights; by default torch-fidelity downloads them.
        device: to run it on.
        real: folder of real pictures of any sizes, also in folders below.
        cache_dir: folder for the real side's statistics.
        extractor: another network, uint8 [B,3,H,W] to a tuple of features [B,F].

    Raises:
        ImportError, FileNotFoundError, ValueError: the package, the weights or the real pictures are missing.
    """

    name, title, larger_is_better = "fid", "FID", False
    draws = 50

    def __init__(self, weights, device, real=None, cache_dir=None, extractor: nn.Module | None = None):
        if real is None:
            raise ValueError("shiva_ext: the metric 'fid' compares with real pictures; say where: --real FOLDER")
        files = sorted(file for file in Path(real).rglob("*") if file.suffix.lower() in IMAGES)
        if len(files) < 2:
            raise FileNotFoundError(
                f"shiva_ext: --real {real} has {len(files)} pictures, wanted a folder with at least 2 of "
                f"{', '.join(IMAGES)}; the field compares with thousands"
            )
        self.extractor = (inception(weights) if extractor is None else extractor).to(device)
        self.device = device
        state = hashlib.sha256()
        for value in self.extractor.state_dict().values():
            state.update(value.detach().cpu().numpy().tobytes())
        self.identity = {"weights": state.hexdigest(), "real": fingerprint(real)}
        self.mean, self.covariance = self._statistics(files, cache_dir)
        self._root = None

    def _statistics(self, files: list[Path], cache_dir) -> tuple[Tensor, Tensor]:
        name = hashlib.sha256(str(sorted(self.identity.items())).encode()).hexdigest()[:20]
        file = None if cache_dir is None else Path(cache_dir) / f"real-{name}.safetensors"
        if file is not None and file.is_file():
            found = load_file(file)
            return found["mean"], found["covariance"]
        mean, covariance = gaussian(torch.cat([self.features(read_picture(each)[None]) for each in files]))
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"mean": mean, "covariance": covariance.contiguous()}, file.with_suffix(".tmp"))
            os.replace(file.with_suffix(".tmp"), file)
        return mean, covariance

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """Features float64 [B,F] of pictures uint8 [B,3,H,W]."""
        return self.extractor(images.to(self.device))[0].flatten(1).double().cpu()

    def measure(self, batches: Iterable[Batch]) -> Measured:
        features = torch.cat([self.features(images) for images, _ in batches])
        value = frechet_distance(*gaussian(features), self.mean, self.covariance)
        return Measured(value, self._resampled(features))

    def _resampled(self, features: Tensor) -> list[float]:
        """What :func:`~.metrics.bootstrap_distances` gives, in minutes where that takes hours at 2,048 features.

        The trace of a square root is the sum of the singular values of A = X C^.5 / (M - 1)^.5, X [M,F] centred, and
        these are the roots of the eigenvalues of A A' or A' A, whichever is smaller. A resample takes rows of X C^.5.
        """
        M, found = len(features), []
        self._root = square_root(self.covariance) if self._root is None else self._root
        turned = features @ self._root
        for rows in resamples(M, self.draws):
            some, factor = features[rows], turned[rows]
            mean, factor = some.mean(0), (factor - factor.mean(0)) / (M - 1) ** 0.5
            squares = factor @ factor.T if M < factor.shape[1] else factor.T @ factor
            overlap = torch.linalg.eigvalsh(squares).clamp_min(0).sqrt().sum()
            spread = (some - mean).square().sum() / (M - 1) + self.covariance.trace()
            found.append(((mean - self.mean).square().sum() + spread - 2 * overlap).item())
        return found
