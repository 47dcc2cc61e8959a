"""Fewer visual tokens in vision-language models of transformers (FEATHER, FastV)."""

from .config import FastVConfig, FeatherConfig, Stage, expected_union, flops_reduction, grid_tokens
from .feather import FeatherHandle

__all__ = [
    "FastVConfig",
    "FeatherConfig",
    "FeatherHandle",
    "Stage",
    "expected_union",
    "flops_reduction",
    "grid_tokens",
]
