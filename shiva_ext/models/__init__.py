"""Adapters: what token selection must know of a model family."""

from .base import Conditioning, ModelAdapter, adapter_for
from .flux import FluxAdapter
from .pixart import PixArtAdapter
from .sd3 import SD3Adapter

__all__ = ["Conditioning", "FluxAdapter", "ModelAdapter", "PixArtAdapter", "SD3Adapter", "adapter_for"]
