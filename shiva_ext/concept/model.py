"""A small causal language model around a chunk: encoder, concept model, decoder."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .chunk import Chunk, Chunks, Dechunk


@dataclass(frozen=True)
class ConceptConfig:
    """Sizes of the model.

    Attributes:
        vocabulary: of the tokens; 256 for bytes.
        width, heads: of every layer.
        encoder, middle, decoder: layers before, on and after the concepts.
        ratio: R, tokens a concept; None for the same model without chunks.
        reduction, tau, fixed: see :class:`~.chunk.Chunk`.
        joint: whether the decoder's attention also reads each token's concept, through projections that begin at zero.
        ratio_weight: lambda of the ratio loss.
        packed: whether the middle layers read all samples' concepts as one sequence without padding, behind a mask of
            who belongs together; equal within rounding. It pays where attention takes such sequences without a mask.
    """

    vocabulary: int = 256
    width: int = 128
    heads: int = 2
    encoder: int = 1
    middle: int = 4
    decoder: int = 1
    ratio: float | None = 2.0
    reduction: str = "first"
    tau: float | None = 6.0
    fixed: bool = False
    joint: bool = True
    ratio_weight: float = 0.03
    packed: bool = False

    def __post_init__(self):
        if self.heads < 1 or self.width % (2 * self.heads) or self.width < 16:
            raise ValueError(
                f"ConceptConfig: width is {self.width}, wanted 16 or more, for {self.heads} heads with an even "
                "number of channels"
            )


def rotary(x: Tensor, position: Tensor | None = None, base: float = 10000.0) -> Tensor:
    """Rotary positions of x [B,heads,N,d]: position [N], or from 0."""
    n, half = x.shape[-2], x.shape[-1] // 2
    position = torch.arange(n, device=x.device) if position is None else position
    rate = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = position.float()[:, None] * rate
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Layer(nn.Module):
    """Causal attention and a SwiGLU MLP, norms before each.

    Args:
        width, heads: of the layer.
        joint: also project a second stream, the tokens' concepts, into queries, keys and values, at first by zeros.
    """

    def __init__(self, width: int, heads: int, joint: bool = False):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 2 * (8 * width // 3 // 16 * 16), bias=False)
        self.down = nn.Linear(8 * width // 3 // 16 * 16, width, bias=False)
        self.concept = nn.Linear(width, 3 * width, bias=False) if joint else None
        if joint:
            nn.init.zeros_(self.concept.weight)

    def forward(
        self, x: Tensor, concept: Tensor | None = None, mask: Tensor | None = None, position: Tensor | None = None
    ) -> Tensor:
        """x [B,N,D], concept [B,N,D] for a joint layer -> [B,N,D]; mask bool [N,N] and position [N] are of sequences
        that stand one after another."""
        qkv = self.qkv(self.norm1(x))
        if self.concept is not None and concept is not None:
            qkv = qkv + self.concept(concept)
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in qkv.chunk(3, dim=-1))
        q, k = rotary(q, position), rotary(k, position)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        value, gate = self.up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * value)


class ConceptModel(nn.Module):
    """Next tokens from those before: encoder layers on tokens, the middle on concepts, decoder layers on tokens.

    Args:
        config: see :class:`ConceptConfig`.
    """

    def __init__(self, config: ConceptConfig):
        super().__init__()
        self.config, width = config, config.width
        chunked = config.ratio is not None
        self.embed = nn.Embedding(config.vocabulary, width)
        self.encoder = nn.ModuleList(Layer(width, config.heads) for _ in range(config.encoder))
        self.middle = nn.ModuleList(Layer(width, config.heads) for _ in range(config.middle))
        joint = chunked and config.joint
        self.decoder = nn.ModuleList(Layer(width, config.heads, joint) for _ in range(config.decoder))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, config.vocabulary, bias=False)
        self.chunk = self.dechunk = None
        if chunked:
            self.chunk = Chunk(width, config.ratio, config.reduction, config.tau, config.fixed)
            self.dechunk = Dechunk()
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, tokens: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Chunks | None]:
        """tokens int64 [B,N] -> logits [B,N,V], and how the sequences were cut."""
        x = self.embed(tokens)
        for layer in self.encoder:
            x = layer(x)
        chunks, concept, inner = None, None, x
        if self.chunk is not None:
            inner, chunks = self.chunk(x, generator)
        if chunks is not None and self.config.packed:
            inner = self._packed(inner, chunks)
        else:
            for layer in self.middle:
                inner = layer(inner)
        if self.chunk is None:
            x = inner
        else:
            x, concept = self.dechunk(x, inner, chunks)
        for layer in self.decoder:
            x = layer(x, concept)
        return self.head(self.norm(x)), chunks

    def _packed(self, concepts: Tensor, chunks: Chunks) -> Tensor:
        x, ends = chunks.pack(concepts)
        order = torch.arange(x.shape[1], device=x.device)
        sample = torch.searchsorted(ends[1:], order.int(), right=True)
        mask = (sample[:, None] == sample) & (order[:, None] >= order)
        for layer in self.middle:
            x = layer(x, mask=mask, position=order - ends[sample])
        return chunks.unpack(x)

    def loss(self, tokens: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """tokens int64 [B,N+1] -> what to minimise, and the cross entropy alone, in nats a token."""
        logits, chunks = self(tokens[:, :-1], generator)
        entropy = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        if chunks is None:
            return entropy, entropy
        return entropy + self.config.ratio_weight * chunks.loss, entropy
