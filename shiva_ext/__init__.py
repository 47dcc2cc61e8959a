"""Learned token selection with a fixed budget for diffusion transformers."""

import importlib
from typing import TYPE_CHECKING

from ._library import __version__, build_info  # isort: skip  (first: it says if this torch is too old for the rest)
from . import _registrations, ops, reference  # noqa: F401

if TYPE_CHECKING:
    from ._summary import summary
    from .api import Handle, disable, enable, get_handle
    from .artifact import ShivaArtifact, load, save
    from .cached import CacheHandle
    from .configuration import Configuration
    from .method_artifact import MethodArtifact

# The ops alone need only torch; what needs diffusers is imported when it is first used.
_LAZY = {
    "CacheHandle": "cached",
    "Configuration": "configuration",
    "Handle": "api",
    "disable": "api",
    "enable": "api",
    "get_handle": "api",
    "MethodArtifact": "method_artifact",
    "ShivaArtifact": "artifact",
    "load": "artifact",
    "save": "artifact",
    "summary": "_summary",
}
_SUBMODULES = (
    "bench",
    "caches",
    "caf",
    "concept",
    "evaluation",
    "methods",
    "models",
    "moe",
    "selection",
    "testbed",
    "training",
    "vit",
    "vlm",
)

__all__ = [
    "CacheHandle",
    "Configuration",
    "Handle",
    "MethodArtifact",
    "ShivaArtifact",
    "__version__",
    "build_info",
    "disable",
    "enable",
    "get_handle",
    "load",
    "ops",
    "reference",
    "save",
    "summary",
]


def __getattr__(name: str):
    if name in _LAZY:
        value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, *_SUBMODULES])
