"""Caches of the testbeds' rows, calibrated on the dense model as they are needed."""

from dataclasses import replace
from pathlib import Path

import torch

import shiva_ext

from ..caches import Cache, read_cache, save_cache
from ..evaluation.image_metric import fingerprint
from .beds import Testbed
from .rows import Dense

SAMPLES = {"teacache": 40, "smoothcache": 20}  # pictures of a calibration
_SHARE = 0.5  # what a calibration's file has as its own; rows have theirs


class Cached(Dense):
    """A row's method with a cache around it, see :class:`~.rows.Method`.

    Which tokens were kept is not recorded: some calls do not get as far.
    """

    measured = True

    def __init__(self, method, handle: shiva_ext.CacheHandle):
        self.method, self.handle = method, handle

    def disable(self) -> None:
        self.handle.disable()
        self.method.disable()


class Caches:
    """The caches that rows may have, by name; a strength is

    - of "teacache" the share of the calls that are reused, of those that a calibration can tell;
    - of "smoothcache" the share of the steps that are computed;
    - of "first block" the threshold of diffusers' FirstBlockCache;
    - of "fora" the interval;
    - of "guidance" the interval of steps that compute both halves.

    Args:
        folder: of the calibrations' files.
        bed: the testbed whose dense model they are of.
        dtype: of the model.
    """

    NAMES = {"teacache": "TeaCache", "smoothcache": "SmoothCache", "first block": "FirstBlockCache"}
    NAMES |= {"fora": "FORA", "guidance": "GuidanceCache"}

    def __init__(self, folder: Path, bed: Testbed, dtype: torch.dtype):
        self.folder, self.bed, self.dtype = Path(folder), bed, dtype

    def file(self, name: str, strength: float, steps: int) -> Path | None:
        """The calibration that a cache needs, made if it is not there; None for those that need none.

        Raises:
            ValueError: there is no cache of this name.
        """
        if name not in self.NAMES:
            raise ValueError(f"there is no cache {name!r}, wanted one of {', '.join(map(repr, self.NAMES))}")
        if name not in SAMPLES:
            return None
        # A schedule follows from a share; a polynomial and its thresholds are for all.
        share = f"-{strength:g}" if name == "smoothcache" else ""
        model = fingerprint(self.bed.model_dir)[:8]
        file = self.folder / f"{self.bed.name}-{model}-{name}-{steps}{share}.json"
        if not file.is_file():
            from ..bench.calibration import CALIBRATIONS, testbed_runs

            share = strength if name == "smoothcache" else _least_share(steps)
            target, run, known = testbed_runs(self.bed, SAMPLES[name], steps, None, self.dtype)
            save_cache(CALIBRATIONS[name](target, run, share=share, **known), file)
        return file

    def cache(self, name: str, strength: float, steps: int) -> Cache:
        """The cache for runs of so many steps."""
        file = self.file(name, strength, steps)
        found = None if file is None else read_cache(file)
        if name == "teacache":
            if strength not in found.thresholds:
                raise ValueError(
                    f"TeaCache: no threshold for a share of {strength:g} at {steps} steps; its calibration has "
                    f"{', '.join(f'{each:g}' for each in found.thresholds)}"
                )
            found = replace(found, threshold=found.thresholds[strength])
        return shiva_ext.Configuration(steps, cache=name, strength=strength, calibration=found).build_cache()

    def put_on(self, transformer, method, name: str, strength: float, steps: int, guided: bool) -> Cached:
        """The cache around a transformer that has the method on it."""
        handle = shiva_ext.enable(transformer, self.cache(name, strength, steps), batched_guidance=guided)
        return Cached(method, handle)


def _least_share(steps: int) -> float:
    """A share that runs of so many steps can reuse: they compute the first and the last."""
    return min(_SHARE, 0.5 * (steps - 2) / steps)
