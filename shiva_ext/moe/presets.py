"""DiT-MoE's models by name (arXiv 2407.11633, table 1), freshly initialised."""

from dataclasses import dataclass

from diffusers import DiTTransformer2DModel
from torch import nn

from .layer import MoEConfig, SparseMoE
from .upcycle import install_experts


@dataclass(frozen=True)
class Preset:
    """A size of table 1.

    Attributes:
        layers, width, heads: of the transformer.
        num_experts: n; two of them a token.
        qk_norm: LayerNorm of each head's queries and keys, which the two largest sizes have.
    """

    layers: int
    width: int
    heads: int
    num_experts: int
    qk_norm: bool = False


PRESETS = {
    "S/2-8E2A": Preset(12, 384, 6, 8),
    "S/2-16E2A": Preset(12, 384, 6, 16),
    "B/2-8E2A": Preset(12, 768, 12, 8),
    "L/2-8E2A": Preset(24, 1024, 16, 8),
    "XL/2-8E2A": Preset(28, 1152, 16, 8, qk_norm=True),
    "G/2-16E2A": Preset(40, 1408, 16, 16, qk_norm=True),
}


def dit_moe(name: str, *, num_classes: int = 1000, sample_size: int = 32, **changes) -> DiTTransformer2DModel:
    """A freshly initialised DiT-MoE: patch 2, 4 latent channels in, 8 out, experts in every block.

    The blocks share one embedding of step and class, as in DiT; diffusers gives each block its own. It drops no labels
    (diffusers' would, in every block by itself): give label ``num_classes`` to a tenth of the samples. Routed experts
    are SwiGLU of 4 times the width, the two shared ones together of 2 times. The largest have billions of weights:
    ``with torch.device("meta")`` builds them without memory.

    Args:
        name: one of :data:`PRESETS`.
        num_classes: ImageNet's 1,000 by default; one more row is for none.
        sample_size: of the latent image; 32 is 256 pixels.
        changes: of :class:`MoEConfig`, e.g. ``capacity_factor=1.25``.

    Raises:
        ValueError: an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    preset = PRESETS[name]
    model = DiTTransformer2DModel(
        num_attention_heads=preset.heads,
        attention_head_dim=preset.width // preset.heads,
        in_channels=4,
        out_channels=8,
        num_layers=preset.layers,
        sample_size=sample_size,
        patch_size=2,
        num_embeds_ada_norm=num_classes,
    )
    share_embedder(model)
    config = MoEConfig(preset.num_experts, 2, 4 * preset.width, 2 * preset.width)
    settings = config.__dict__ | changes
    install_experts(
        model, {f"transformer_blocks.{i}.ff": (preset.width, MoEConfig(**settings)) for i in range(preset.layers)}
    )
    if preset.qk_norm:
        add_qk_norm(model)
    initialise(model)
    return model


class HeadNorm(nn.LayerNorm):
    """Of each head's queries or keys."""


def share_embedder(model: DiTTransformer2DModel) -> None:
    """Let all blocks use the first one's embedding of step and class, as DiT has it, which drops no labels."""
    blocks = model.transformer_blocks
    blocks[0].norm1.emb.class_embedder.dropout_prob = 0.0  # each block would draw for itself
    for block in blocks[1:]:
        block.norm1.emb = blocks[0].norm1.emb


def add_qk_norm(model: DiTTransformer2DModel) -> None:
    """Normalise each head's queries and keys."""
    for block in model.transformer_blocks:
        width = block.attn1.inner_dim // block.attn1.heads
        block.attn1.norm_q, block.attn1.norm_k = HeadNorm(width), HeadNorm(width)


def initialise(model: DiTTransformer2DModel) -> None:
    """As DiT begins: every block the identity (modulations zero), the output zero."""
    zeroed = [model.proj_out_1, model.proj_out_2, *(block.norm1.linear for block in model.transformer_blocks)]
    for layer in zeroed:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """All weights, and those that one token passes: of each layer's routed experts only ``top_k``."""
    total = sum(weight.numel() for weight in model.parameters())
    idle = 0
    for layer in model.modules():
        if isinstance(layer, SparseMoE):
            routed = sum(weight.numel() for weight in layer.experts.parameters())
            whole = routed * getattr(layer.experts, "world", 1)  # shared out among processes
            total, routed = total + whole - routed, whole
            idle += routed * (layer.config.num_experts - layer.config.top_k) // layer.config.num_experts
    return total, total - idle
