"""Flux.1 (double and single stream blocks with rotary positions)."""

import torch
from torch import Tensor, nn

from .. import ops
from ..evaluation.flops import flux_forward_flops
from .base import Conditioning, register
from .per_sample import PerSampleAdapter, each_sample


@register
class FluxAdapter(PerSampleAdapter):
    """``FluxTransformer2DModel``: joint blocks over text and image tokens, then blocks over both in one stream.

    Layers are counted through both kinds. Text tokens are never pruned. Positions are rotary and come as one table of
    text and image rows for the whole batch, so a block gets the rows of its kept tokens; since these differ from sample
    to sample, it runs once for each.
    """

    model_class = "FluxTransformer2DModel"
    shared_arguments = ("image_rotary_emb",)
    image_output = 1
    guides_in_batch = False

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]

    def dims(self, transformer: nn.Module) -> dict[str, int]:
        D = transformer.inner_dim
        return dict(dim=D, temb_dim=D, pooled_dim=D, num_layers=len(self.blocks(transformer)))

    def num_tokens(self, transformer: nn.Module) -> int:
        return 64 * 64  # 1024 x 1024 pixels, the pipeline's default; the configuration names no size

    def grid(self, transformer: nn.Module, arguments: dict) -> tuple[int, int]:
        positions, N = arguments["img_ids"], arguments["hidden_states"].shape[1]
        height, width = (int(side) + 1 for side in positions.reshape(-1, 3)[:, 1:].amax(dim=0).tolist())
        if height * width != N:
            raise TypeError(
                f"shiva_ext: the {N} image tokens are not one picture of {height} x {width} (Flux Kontext appends "
                "others), so there are no rows and columns to work with; this method is not for it"
            )
        return height, width

    def cache_sites(self, block: nn.Module) -> dict[str, list]:
        if hasattr(block, "proj_mlp"):  # one stream: what goes into its one projection out
            return {"attention": [(block.attn, ("joint",))], "mlp": [(block.proj_mlp, ("joint",))]}
        mlp = [(block.ff, ("image",)), (block.ff_context, ("text",))]
        # An IP-Adapter adds a third tensor.
        return {"attention": [(block.attn, ("image", "text", "image"))], "mlp": mlp}

    def modulated_input(self, block: nn.Module, x: Tensor, arguments: dict) -> Tensor:
        return block.norm1(x, emb=arguments["temb"])[0]

    def forward_flops(self, transformer: nn.Module, *args, **options) -> int:
        return flux_forward_flops(transformer, *args, **options)

    def conditioning(self, transformer: nn.Module, arguments: dict) -> Conditioning:
        pooled, guidance = arguments["pooled_projections"], arguments.get("guidance")
        embed, dtype = transformer.time_text_embed, arguments["hidden_states"].dtype
        timestep = arguments["timestep"].to(dtype).expand(len(pooled)) * 1000
        time = embed.timestep_embedder(embed.time_proj(timestep).to(pooled.dtype))
        if guidance is not None:
            time = time + embed.guidance_embedder(embed.time_proj(guidance.to(dtype) * 1000).to(pooled.dtype))
        return Conditioning(timestep, time, embed.text_embedder(pooled))

    def each_sample(self, run, arguments: dict, kept: Tensor):
        tables = arguments.get("image_rotary_emb")
        if tables is None:
            return run(arguments, kept)
        T = arguments["encoder_hidden_states"].shape[1]
        if len(kept) > 1 and (arguments.get("joint_attention_kwargs") or {}).get("ip_hidden_states") is not None:
            raise ValueError(
                "shiva_ext: Flux with an IP-Adapter selects tokens for one image at a time; call it with batch size 1"
            )
        images = [ops.token_gather(table[T:].contiguous(), kept) for table in tables]  # [B,k,d]

        def positions(b: int) -> dict:
            rows = (torch.cat([table[:T], image[b]]) for table, image in zip(tables, images, strict=True))
            return {"image_rotary_emb": tuple(rows)}

        split = (self.image_argument, "encoder_hidden_states", "temb")
        return each_sample(run, arguments, kept, split, positions)
