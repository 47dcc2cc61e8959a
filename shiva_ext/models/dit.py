"""DiT (class-conditional)."""

from torch import Tensor, nn

from ..evaluation.flops import dit_forward_flops
from .base import Conditioning, ModelAdapter, register


@register
class DiTAdapter(ModelAdapter):
    """``DiTTransformer2DModel``: self-attention over image tokens; timestep and class enter by modulation.

    Absolute positions are added before the first block, so a gathered token carries its own. The class's embedding
    takes the place of a pooled prompt; both embeddings are those of the first block, as each has its own.
    """

    model_class = "DiTTransformer2DModel"
    row_arguments = ("hidden_states", "timestep", "class_labels")
    prompted_first = True

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        return list(transformer.transformer_blocks)

    def dims(self, transformer: nn.Module) -> dict[str, int]:
        D = transformer.inner_dim
        return dict(dim=D, temb_dim=D, pooled_dim=D, num_layers=len(transformer.transformer_blocks))

    def num_tokens(self, transformer: nn.Module) -> int:
        return (transformer.config.sample_size // transformer.config.patch_size) ** 2

    def merge_sites(self, block: nn.Module) -> dict[str, list[nn.Module]]:
        return {"attention": [block.attn1], "mlp": [block.ff], "mlp_norm": [block.norm3]}

    def cache_sites(self, block: nn.Module) -> dict[str, list]:
        return {"attention": [(block.attn1, ("image",))], "mlp": [(block.ff, ("image",))]}

    def modulated_input(self, block: nn.Module, x: Tensor, arguments: dict) -> Tensor:
        return block.norm1(x, arguments["timestep"], arguments["class_labels"], hidden_dtype=x.dtype)[0]

    def forward_flops(self, transformer: nn.Module, *args, **options) -> int:
        return dit_forward_flops(transformer, *args, **options)

    def conditioning(self, transformer: nn.Module, arguments: dict) -> Conditioning:
        timestep, labels, x = arguments["timestep"], arguments["class_labels"], arguments["hidden_states"]
        embed = transformer.transformer_blocks[0].norm1.emb
        timestep = timestep.expand(len(x))
        time = embed.timestep_embedder(embed.time_proj(timestep).to(x.dtype))
        return Conditioning(timestep, time, embed.class_embedder.embedding_table(labels))
