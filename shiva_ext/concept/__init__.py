"""Sequences as fewer concepts (ConceptMoE, arXiv 2601.21420)."""

from .chunk import Chunk, Chunks, Dechunk, ratio_loss, sharpen
from .model import ConceptConfig, ConceptModel

__all__ = ["Chunk", "Chunks", "ConceptConfig", "ConceptModel", "Dechunk", "ratio_loss", "sharpen"]
