"""Sana (linear attention, and an MLP with a convolution over the image)."""

from diffusers.hooks import ModelHook
from torch import Tensor, nn

from .. import ops
from ..evaluation.flops import sana_forward_flops
from .adaln_single import AdaLNSingleAdapter
from .base import Conditioning, register
from .prompt import mean_token


class _OnGrid(ModelHook):
    """On a depthwise convolution: kept tokens take their places in the image, all others are empty (zero)."""

    def __init__(self, adapter: "SanaAdapter"):
        super().__init__()
        self.adapter = adapter

    def new_forward(self, module: nn.Module, x: Tensor) -> Tensor:
        forward = self.fn_ref.original_forward
        if self.adapter.placed is None:
            return forward(x)
        kept, (height, width) = self.adapter.placed
        rows = x.squeeze(3).transpose(1, 2)  # [B,k,C]
        empty = rows.new_zeros((len(rows), height * width, rows.shape[2]))
        image = ops.token_scatter(empty, kept, rows).unflatten(1, (height, width)).permute(0, 3, 1, 2)
        out = forward(image).permute(0, 2, 3, 1).flatten(1, 2)
        return ops.token_gather(out, kept).transpose(1, 2).unsqueeze(3)


@register
class SanaAdapter(AdaLNSingleAdapter):
    """``SanaTransformer2DModel``: linear attention, cross-attention to the prompt, and a gated MLP whose 3 x 3
    depthwise convolution sees a token's neighbours.

    In a pruned block, a neighbour that was not kept counts as the image's border does: as zero. There is no pooled
    prompt: the router gets the projection of the prompt's mean token.

    Attributes:
        placed: while a pruned block runs, its kept tokens [B,k] and the image's height and width in tokens.
    """

    model_class = "SanaTransformer2DModel"
    shared_arguments = ("height", "width")
    mlp_gives = "map"

    def __init__(self):
        self.placed: tuple[Tensor, tuple[int, int]] | None = None

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        return list(transformer.transformer_blocks)

    def inner_hooks(self, block: nn.Module) -> list[tuple[nn.Module, ModelHook]]:
        return [(block.ff.conv_depth, _OnGrid(self))]

    def dims(self, transformer: nn.Module) -> dict[str, int]:
        config = transformer.config
        D = config.num_attention_heads * config.attention_head_dim
        return dict(dim=D, temb_dim=D, pooled_dim=D, num_layers=len(transformer.transformer_blocks))

    def num_tokens(self, transformer: nn.Module) -> int:
        return (transformer.config.sample_size // transformer.config.patch_size) ** 2

    def forward_flops(self, transformer: nn.Module, *args, **options) -> int:
        return sana_forward_flops(transformer, *args, **options)

    def conditioning(self, transformer: nn.Module, arguments: dict) -> Conditioning:
        if arguments.get("attention_mask") is not None:
            raise ValueError(
                "shiva_ext: attention_mask masks image tokens, which selection leaves out by itself; wanted None, as "
                "Sana's pipelines pass (the prompt's mask is encoder_attention_mask)"
            )
        prompt, guidance = arguments["encoder_hidden_states"], arguments.get("guidance")
        timestep = arguments["timestep"].expand(len(prompt))
        embed = transformer.time_embed if guidance is not None else transformer.time_embed.emb
        time = embed.timestep_embedder(embed.time_proj(timestep).to(prompt.dtype))
        if guidance is not None:
            sinusoid = embed.guidance_condition_proj(guidance).to(prompt.dtype)
            time = time + embed.guidance_embedder(sinusoid)
        mean = mean_token(prompt, arguments.get("encoder_attention_mask"))
        pooled = transformer.caption_norm(transformer.caption_projection(mean))
        return Conditioning(timestep / transformer.config.timestep_scale, time, pooled)

    def call(self, forward, tokens: Tensor, args: tuple, kwargs: dict, kept: Tensor | None = None):
        if kept is None:
            return super().call(forward, tokens, args, kwargs)
        arguments = {**self.bind(forward, args, kwargs), self.image_argument: tokens}
        self.placed = kept, (arguments["height"], arguments["width"])
        try:  # the kept tokens as an image one token wide, for all but the convolution
            return forward(**{**arguments, "height": tokens.shape[1], "width": 1})
        finally:
            self.placed = None
