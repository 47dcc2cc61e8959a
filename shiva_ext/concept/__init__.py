"""Sequences as fewer concepts (ConceptMoE, arXiv 2601.21420)."""

from .chunk import Chunk, Chunks, Dechunk, ratio_loss, sharpen

__all__ = ["Chunk", "Chunks", "Dechunk", "ratio_loss", "sharpen"]
