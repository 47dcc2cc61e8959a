"""Caches: what a step leaves out because an earlier one has computed almost the same."""

from .base import Cache
from .file import SmoothCacheFile, TeaCacheFile, load_cache, read_cache, save_cache
from .fit import Fit
from .from_diffusers import DiffusersCache
from .guidance import GuidanceCache
from .published import COEFFICIENTS
from .schedule import every, make_schedule
from .smoothcache import FORA, SmoothCache
from .teacache import TeaCache

__all__ = [
    "COEFFICIENTS",
    "FORA",
    "Cache",
    "DiffusersCache",
    "Fit",
    "GuidanceCache",
    "SmoothCache",
    "SmoothCacheFile",
    "TeaCache",
    "TeaCacheFile",
    "every",
    "load_cache",
    "make_schedule",
    "read_cache",
    "save_cache",
]
