"""Fewer patches in vision transformers of transformers: TNT, DynamicViT, Shiva's estimators, random."""

from .config import DynamicViTConfig, PatchConfig, RandomPatchConfig, ShivaViTConfig, TNTConfig
from .handle import ViTHandle
from .pruner import PatchPruner, load
from .similarity import drop_similar

__all__ = [
    "DynamicViTConfig",
    "PatchConfig",
    "PatchPruner",
    "RandomPatchConfig",
    "ShivaViTConfig",
    "TNTConfig",
    "ViTHandle",
    "drop_similar",
    "load",
]
