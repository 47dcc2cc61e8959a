"""Adapters: what token selection must know of a model family."""

from .base import Conditioning, ModelAdapter, adapter_for
from .dit import DiTAdapter
from .flux import FluxAdapter
from .pixart import PixArtAdapter
from .qwenimage import QwenImageAdapter
from .sana import SanaAdapter
from .sd3 import SD3Adapter
from .wan import WanAdapter

__all__ = [
    "Conditioning",
    "DiTAdapter",
    "FluxAdapter",
    "ModelAdapter",
    "PixArtAdapter",
    "QwenImageAdapter",
    "SD3Adapter",
    "SanaAdapter",
    "WanAdapter",
    "adapter_for",
]
