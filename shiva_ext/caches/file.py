"""A calibrated cache as a JSON file, which says what it was calibrated for."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from .._library import __version__
from ..files import write_text
from .base import Cache
from .fit import Fit
from .schedule import make_schedule
from .smoothcache import SmoothCache
from .teacache import TeaCache

FORMAT = 1


@dataclass(frozen=True)
class TeaCacheFile:
    """What ``shiva calibrate teacache`` has found.

    Attributes:
        coefficients: of the polynomial, highest power first.
        bounds: least and largest change of the indicator that it was fitted to.
        r2: share of the variance of the output's changes that the polynomial explains.
        thresholds: share of the calls that are reused, to the threshold that leads to it on the calibration's runs.
        threshold: the one to use.
        fit: model, scheduler and steps.
    """

    coefficients: tuple[float, ...]
    bounds: tuple[float, float]
    r2: float
    thresholds: dict[float, float]
    threshold: float
    fit: Fit
    pairs: tuple[tuple[float, float], ...] = field(default=(), repr=False)

    def cache(self, threshold: float | None = None) -> TeaCache:
        """The cache, by default with the file's threshold."""
        value = self.threshold if threshold is None else threshold
        return TeaCache(value, self.coefficients, self.bounds, steps=self.fit.steps, fit=self.fit)

    def to_json(self) -> dict:
        return {
            "coefficients": list(self.coefficients),
            "bounds": list(self.bounds),
            "r2": self.r2,
            "thresholds": [[share, threshold] for share, threshold in sorted(self.thresholds.items())],
            "threshold": self.threshold,
            "pairs": [list(pair) for pair in self.pairs],
        }

    @classmethod
    def from_json(cls, content: dict, fit: Fit) -> "TeaCacheFile":
        return cls(
            tuple(content["coefficients"]),
            tuple(content["bounds"]),
            content["r2"],
            dict(map(tuple, content["thresholds"])),
            content["threshold"],
            fit,
            tuple(map(tuple, content.get("pairs", ()))),
        )


@dataclass(frozen=True)
class SmoothCacheFile:
    """What ``shiva calibrate smoothcache`` has found.

    Attributes:
        errors: by kind of module, by lag k: of reusing the output of step i at step i + k.
        alpha: largest error, from which the schedules follow.
        between: see :func:`make_schedule`.
        fit: model, scheduler and steps.
    """

    errors: dict[str, dict[int, tuple[float, ...]]]
    alpha: float
    fit: Fit
    between: bool = False

    def cache(self, alpha: float | None = None) -> SmoothCache:
        """The cache with the schedules for a largest error, by default the file's."""
        value = self.alpha if alpha is None else alpha
        schedules = {
            kind: make_schedule(rows, value, self.fit.steps, self.between) for kind, rows in self.errors.items()
        }
        return SmoothCache(schedules, fit=self.fit)

    def to_json(self) -> dict:
        errors = {kind: {str(k): list(row) for k, row in rows.items()} for kind, rows in self.errors.items()}
        schedules = {kind: list(schedule) for kind, schedule in self.cache().schedules.items()}
        return {"alpha": self.alpha, "between": self.between, "schedules": schedules, "errors": errors}

    @classmethod
    def from_json(cls, content: dict, fit: Fit) -> "SmoothCacheFile":
        errors = {kind: {int(k): tuple(row) for k, row in rows.items()} for kind, rows in content["errors"].items()}
        return cls(errors, content["alpha"], fit, content["between"])


_KINDS = {"teacache": TeaCacheFile, "smoothcache": SmoothCacheFile}


def cache_to_json(found: TeaCacheFile | SmoothCacheFile) -> dict:
    """A calibration as JSON values."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(found, cls))
    return {"format": FORMAT, "shiva_ext": __version__, "cache": kind, "fit": found.fit.to_json(), **found.to_json()}


def cache_from_json(content: dict) -> TeaCacheFile | SmoothCacheFile:
    """What :func:`cache_to_json` gave.

    Raises:
        KeyError, TypeError, ValueError: it is something else, or of a newer format.
    """
    kind, version = content["cache"], content["format"]
    if version > FORMAT:
        raise ValueError(f"its format is {version}, this shiva_ext knows up to {FORMAT}; upgrade it")
    found = _KINDS[kind].from_json(content, Fit.from_json(content["fit"]))
    found.cache()  # what is in it can be used
    return found


def save_cache(found: TeaCacheFile | SmoothCacheFile, file: str | os.PathLike) -> None:
    """Write a calibration; whole, or not at all."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(cache_to_json(found), indent=1) + "\n")


def read_cache(file: str | os.PathLike) -> TeaCacheFile | SmoothCacheFile:
    """What a file holds.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no calibration, or of a newer format.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"shiva_ext: there is no {file}; `shiva calibrate` writes one")
    try:
        return cache_from_json(json.loads(file.read_text()))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"shiva_ext: {file} is no calibration of a cache: {type(error).__name__}: {error}") from error


def load_cache(file: str | os.PathLike) -> Cache:
    """The cache of a file, as it was calibrated; for another threshold or alpha see :func:`read_cache`.

    Raises: as :func:`read_cache`.
    """
    return read_cache(file).cache()
