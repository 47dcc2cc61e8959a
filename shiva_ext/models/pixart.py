"""PixArt-α and PixArt-Σ (DiT with cross-attention)."""

from torch import nn

from ..evaluation.flops import pixart_forward_flops
from .adaln_single import AdaLNSingleAdapter
from .base import Conditioning, register
from .prompt import mean_token


@register
class PixArtAdapter(AdaLNSingleAdapter):
    """``PixArtTransformer2DModel``: self-attention over image tokens, cross-attention to the prompt.

    Absolute positions are added before the first block, so a gathered token carries its own. There is no pooled prompt:
    the router gets the projection of the prompt's mean token, masked tokens left out.
    """

    model_class = "PixArtTransformer2DModel"

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        return list(transformer.transformer_blocks)

    def dims(self, transformer: nn.Module) -> dict[str, int]:
        D = transformer.inner_dim
        pooled = D if transformer.caption_projection is not None else transformer.config.cross_attention_dim
        return dict(dim=D, temb_dim=D, pooled_dim=pooled, num_layers=len(transformer.transformer_blocks))

    def num_tokens(self, transformer: nn.Module) -> int:
        return (transformer.config.sample_size // transformer.config.patch_size) ** 2

    def merge_sites(self, block: nn.Module) -> dict[str, list[nn.Module]]:
        return {"attention": [block.attn1], "mlp": [block.ff], "mlp_norm": [block.norm2]}

    def forward_flops(self, transformer: nn.Module, *args, **options) -> int:
        return pixart_forward_flops(transformer, *args, **options)

    def conditioning(self, transformer: nn.Module, arguments: dict) -> Conditioning:
        if arguments.get("attention_mask") is not None:
            raise ValueError(
                "shiva_ext: attention_mask masks image tokens, which selection leaves out by itself; wanted None, as "
                "PixArt's pipelines pass (the prompt's mask is encoder_attention_mask)"
            )
        prompt = arguments["encoder_hidden_states"]
        timestep = arguments["timestep"].expand(len(prompt))
        embed = transformer.adaln_single.emb
        sinusoid = embed.time_proj(timestep).to(prompt.dtype)
        mean = mean_token(prompt, arguments.get("encoder_attention_mask"))
        pooled = mean if transformer.caption_projection is None else transformer.caption_projection(mean)
        return Conditioning(timestep, embed.timestep_embedder(sinusoid), pooled)
