"""Stable Diffusion 3 and 3.5 (MM-DiT)."""

from torch import Tensor, nn

from ..evaluation.flops import sd3_forward_flops
from .base import Conditioning, ModelAdapter, register


@register
class SD3Adapter(ModelAdapter):
    """``SD3Transformer2DModel``: joint blocks over image and text tokens, absolute positions.

    Positions are added before the first block, so a gathered token carries its own. Text tokens are never pruned. A
    block returns (text tokens, image tokens); the last one returns None for the text.
    """

    model_class = "SD3Transformer2DModel"
    image_output = 1

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        return list(transformer.transformer_blocks)

    def dims(self, transformer: nn.Module) -> dict[str, int]:
        D = transformer.inner_dim
        return dict(dim=D, temb_dim=D, pooled_dim=D, num_layers=len(transformer.transformer_blocks))

    def num_tokens(self, transformer: nn.Module) -> int:
        return (transformer.config.sample_size // transformer.config.patch_size) ** 2

    def token_costs(self, transformer: nn.Module) -> list[int]:
        # Matrix products of D x D: 4 of the attention, 8 of the MLP, and 4 where there is a second attention.
        dual = transformer.config.dual_attention_layers
        return [4 if layer in dual else 3 for layer in range(len(transformer.transformer_blocks))]

    def merge_sites(self, block: nn.Module) -> dict[str, list[nn.Module]]:
        attention = [block.attn] if getattr(block, "attn2", None) is None else [block.attn, block.attn2]
        return {"attention": attention, "mlp": [block.ff], "mlp_norm": [block.norm2]}

    def cache_sites(self, block: nn.Module) -> dict[str, list]:
        second = getattr(block, "attn2", None)
        text = [] if block.ff_context is None else [(block.ff_context, ("text",))]
        return {
            "attention": [(block.attn, ("image", "text"))] + ([] if second is None else [(second, ("image",))]),
            "mlp": [(block.ff, ("image",)), *text],
        }

    def modulated_input(self, block: nn.Module, x: Tensor, arguments: dict) -> Tensor:
        return block.norm1(x, emb=arguments["temb"])[0]

    def forward_flops(self, transformer: nn.Module, *args, **options) -> int:
        return sd3_forward_flops(transformer, *args, **options)

    def conditioning(self, transformer: nn.Module, arguments: dict) -> Conditioning:
        timestep, pooled = arguments["timestep"], arguments["pooled_projections"]
        timestep = timestep.expand(len(pooled))  # one timestep may serve the whole batch
        embed = transformer.time_text_embed
        sinusoid = embed.time_proj(timestep).to(pooled.dtype)
        return Conditioning(timestep, embed.timestep_embedder(sinusoid), embed.text_embedder(pooled))

    def batched_guidance(self, arguments: dict, pipeline_guides: bool) -> bool:
        # Skip-layer guidance is a further call, on the conditional half alone.
        return pipeline_guides and arguments.get("skip_layers") is None
