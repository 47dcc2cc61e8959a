"""Learned token selection with a fixed budget for diffusion transformers."""

from . import _registrations, ops, reference  # noqa: F401
from ._library import __version__, build_info
from .api import Handle, disable, enable, get_handle
from .artifact import ShivaArtifact
from .summary import summary

load = ShivaArtifact.load


def save(artifact: ShivaArtifact, folder):
    """Write an artefact as a folder; see :meth:`ShivaArtifact.save`."""
    return artifact.save(folder)


__all__ = [
    "Handle",
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
