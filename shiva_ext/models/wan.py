"""Wan (video, with rotary positions in time, height and width)."""

from torch import Tensor, nn

from .. import ops
from ..evaluation.flops import wan_forward_flops
from .base import Conditioning, ModelAdapter, register
from .prompt import mean_token


@register
class WanAdapter(ModelAdapter):
    """``WanTransformer3DModel``: self-attention over a video's tokens, cross-attention to the prompt.

    A pruned block gets the rows of its kept tokens from the rotary tables and, where every token has a timestep of its
    own (the models that take a first frame), from the modulation; the router then gets the largest timestep. The
    pipeline guides in two calls, which select each for itself. There is no pooled prompt: the router gets the
    projection of the prompt's mean token.
    """

    model_class = "WanTransformer3DModel"
    shared_arguments = ("rotary_emb",)
    guides_in_batch = False

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        return list(transformer.blocks)

    def dims(self, transformer: nn.Module) -> dict[str, int]:
        D = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        return dict(dim=D, temb_dim=D, pooled_dim=D, num_layers=len(transformer.blocks))

    def num_tokens(self, transformer: nn.Module) -> int:
        return 21 * 30 * 52  # 81 frames of 832 x 480 pixels, the pipeline's default; the configuration names no size

    def cache_sites(self, block: nn.Module) -> dict[str, list]:
        return {
            "attention": [(block.attn1, ("image",))],
            "cross_attention": [(block.attn2, ("image",))],
            "mlp": [(block.ffn, ("image",))],
        }

    def modulated_input(self, block: nn.Module, x: Tensor, arguments: dict) -> Tensor:
        return arguments["temb"]  # the step's embedding alone, as TeaCache has it for Wan

    def forward_flops(self, transformer: nn.Module, *args, **options) -> int:
        return wan_forward_flops(transformer, *args, **options)

    def conditioning(self, transformer: nn.Module, arguments: dict) -> Conditioning:
        prompt, embed = arguments["encoder_hidden_states"], transformer.condition_embedder
        timestep = arguments["timestep"]
        timestep = timestep.amax(dim=1) if timestep.ndim == 2 else timestep.expand(len(prompt))
        weight = next(embed.time_embedder.parameters())
        sinusoid = embed.timesteps_proj(timestep)
        time = embed.time_embedder(sinusoid.to(weight.dtype) if weight.is_floating_point() else sinusoid)
        return Conditioning(timestep, time.type_as(prompt), embed.text_embedder(mean_token(prompt, None)))

    def call(self, forward, tokens: Tensor, args: tuple, kwargs: dict, kept: Tensor | None = None):
        arguments = {**self.bind(forward, args, kwargs), self.image_argument: tokens}
        if kept is None:
            return forward(**arguments)
        tables, temb = arguments.get("rotary_emb"), arguments["temb"]
        if tables is not None:  # [1,N,1,d] each
            arguments["rotary_emb"] = tuple(
                ops.token_gather(t[0, :, 0].contiguous(), kept).unsqueeze(2) for t in tables
            )
        if temb.ndim == 4:  # [B,N,6,D]
            arguments["temb"] = ops.token_gather(temb.flatten(2), kept).unflatten(2, (6, -1))
        return forward(**arguments)
