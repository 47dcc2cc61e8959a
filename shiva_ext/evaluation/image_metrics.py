"""The field's metrics of pictures behind one interface: CLIP score, CLIP-IQA, FID and ImageReward.

Their packages and weights are looked for when a metric is made, not when it is first used: a sweep of hours must not
end with a missing file. Every one takes its weights from a local folder or file, too.
"""

from .clip_metrics import ClipIqa, ClipScore
from .fid import Fid
from .image_metric import ImageMetric
from .image_reward import ImageReward

METRICS: dict[str, type[ImageMetric]] = {cls.name: cls for cls in (ClipScore, ClipIqa, Fid, ImageReward)}


def load_metric(name: str, weights=None, device="cpu", real=None, cache_dir=None) -> ImageMetric:
    """A metric, ready to measure.

    Args:
        name: one of :data:`METRICS`.
        weights: a local folder (CLIP, ImageReward) or file (FID); by default what its authors published.
        device: to run it on.
        real, cache_dir: of FID, see :class:`Fid`.

    Raises:
        ValueError: an unknown name, or weights of another kind.
        ImportError, FileNotFoundError: its package or its weights cannot be had; the message says what to do.
    """
    if name not in METRICS:
        raise ValueError(f"shiva_ext: unknown metric {name!r}; wanted some of {', '.join(METRICS)}")
    return METRICS[name](weights, device, **({"real": real, "cache_dir": cache_dir} if name == "fid" else {}))
