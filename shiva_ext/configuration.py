"""A selection and a cache that belong together, as one file for ``enable``: what ``shiva tune`` writes."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from ._library import __version__
from .caches import FORA, Cache, DiffusersCache, GuidanceCache
from .caches.file import SmoothCacheFile, TeaCacheFile, cache_from_json, cache_to_json
from .files import write_text

FORMAT = 1


@dataclass(frozen=True)
class Configuration:
    """Settings of a selection, a cache and a number of steps.

    Attributes:
        steps: of the sampler; the caller gives them to the pipeline, and a cache that was made for them refuses others.
        selection: folder or hub id of an artefact, or None.
        budget: mean share of the tokens to keep; None is the artefact's own.
        cache: "teacache", "smoothcache", "fora", "guidance" or "first block", or None.
        strength: of the last three: interval, ``every``, threshold.
        calibration: of the first two.
        measured: free JSON values: what was measured of it.
    """

    steps: int
    selection: str | None = None
    budget: float | None = None
    cache: str | None = None
    strength: float | None = None
    calibration: TeaCacheFile | SmoothCacheFile | None = None
    measured: dict = field(default_factory=dict)

    def build_cache(self) -> Cache | None:
        """The cache, if there is one.

        Raises:
            ValueError: an unknown one.
        """
        if self.cache is None:
            return None
        if self.cache in ("teacache", "smoothcache"):
            if self.calibration is None:
                raise ValueError(f"shiva_ext: the configuration has {self.cache}, but no calibration of it")
            return self.calibration.cache()
        if self.cache in ("fora", "guidance", "first block") and self.strength is None:
            raise ValueError(f"shiva_ext: the configuration has the cache {self.cache!r}, but no strength of it")
        if self.cache == "fora":
            return FORA(int(self.strength), self.steps)
        if self.cache == "guidance":
            return GuidanceCache(int(self.strength), steps=self.steps)
        if self.cache == "first block":
            from diffusers import FirstBlockCacheConfig

            return DiffusersCache(FirstBlockCacheConfig(self.strength), self.steps)
        raise ValueError(
            f"shiva_ext: the configuration has a cache {self.cache!r}, wanted 'teacache', 'smoothcache', 'fora', "
            "'guidance', 'first block' or none"
        )

    def save(self, file: str | os.PathLike) -> None:
        """Write it; whole, or not at all."""
        calibration = None if self.calibration is None else cache_to_json(self.calibration)
        content = {k: v for k, v in vars(self).items() if k != "calibration"}
        content = {"configuration": FORMAT, "shiva_ext": __version__, **content, "calibration": calibration}
        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, file: str | os.PathLike) -> "Configuration":
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is something else, damaged, or of a newer format.
        """
        file = Path(file)
        if not file.is_file():
            raise FileNotFoundError(f"shiva_ext: there is no {file}; `shiva tune` writes one")
        try:
            content = json.loads(file.read_text())
            version = content.pop("configuration")
            if version > FORMAT:
                raise ValueError(f"its format is {version}, this shiva_ext knows up to {FORMAT}; upgrade it")
            content.pop("shiva_ext")
            calibration = content.pop("calibration")
            return cls(**content, calibration=None if calibration is None else cache_from_json(calibration))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"shiva_ext: {file} is no configuration: {error}") from error


def is_configuration(file: str | os.PathLike) -> bool:
    """Whether a JSON file holds a configuration, and not a cache's calibration alone."""
    try:
        return "configuration" in json.loads(Path(file).read_text())
    except (OSError, ValueError):
        return False
