"""Qwen-Image (joint blocks with rotary positions)."""

import torch
from torch import Tensor, nn

from .. import ops
from ..evaluation.flops import qwenimage_forward_flops
from .base import Conditioning, register
from .per_sample import PerSampleAdapter, each_sample
from .prompt import mean_token


@register
class QwenImageAdapter(PerSampleAdapter):
    """``QwenImageTransformer2DModel``: joint blocks over image and text tokens, complex rotary positions.

    Text tokens are never pruned. The positions are one table for the whole batch, so a pruned block runs once for each
    sample, with the rows of its kept tokens. The pipeline guides in two calls, which select each for itself. There is
    no pooled prompt: the router gets the projection of the prompt's mean token.
    """

    model_class = "QwenImageTransformer2DModel"
    row_arguments = ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "temb")
    shared_arguments = ("image_rotary_emb",)
    image_output = 1
    guides_in_batch = False

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        return list(transformer.transformer_blocks)

    def dims(self, transformer: nn.Module) -> dict[str, int]:
        D = transformer.inner_dim
        return dict(dim=D, temb_dim=D, pooled_dim=D, num_layers=len(transformer.transformer_blocks))

    def num_tokens(self, transformer: nn.Module) -> int:
        return 64 * 64  # 1024 x 1024 pixels; the configuration names no size

    def cache_sites(self, block: nn.Module) -> dict[str, list]:
        mlp = [(block.img_mlp, ("image",)), (block.txt_mlp, ("text",))]
        return {"attention": [(block.attn, ("image", "text"))], "mlp": mlp}

    def modulated_input(self, block: nn.Module, x: Tensor, arguments: dict) -> Tensor:
        if arguments.get("modulate_index") is not None:
            raise TypeError("shiva_ext: tokens with two timesteps (Qwen-Image-Edit) have no one modulated input")
        shift, scale = block.img_mod(arguments["temb"]).chunk(6, dim=-1)[:2]
        return block.img_norm1(x) * (1 + scale[:, None]) + shift[:, None]

    def forward_flops(self, transformer: nn.Module, *args, **options) -> int:
        return qwenimage_forward_flops(transformer, *args, **options)

    def conditioning(self, transformer: nn.Module, arguments: dict) -> Conditioning:
        prompt, x = arguments["encoder_hidden_states"], arguments["hidden_states"]
        timestep = arguments["timestep"].to(x.dtype).expand(len(prompt))
        time = transformer.time_text_embed(timestep, x, arguments.get("additional_t_cond"))
        mean = mean_token(transformer.txt_norm(prompt), arguments.get("encoder_hidden_states_mask"))
        return Conditioning(timestep * 1000, time, transformer.txt_in(mean))

    def each_sample(self, run, arguments: dict, kept: Tensor):
        tables = arguments.get("image_rotary_emb")
        if tables is None:
            return run(arguments, kept)
        table = torch.view_as_real(tables[0]).flatten(1).contiguous()  # [N,d]; the gather knows no complex numbers
        rows = torch.view_as_complex(ops.token_gather(table, kept).unflatten(2, (-1, 2)))  # [B,k,d/2]
        modulation = arguments.get("modulate_index")  # [B,N] or [1,N]: which of two timesteps a token has
        if modulation is not None:
            arguments["modulate_index"] = modulation.expand(len(kept), -1).gather(1, kept)
            if len(arguments["temb"]) == 2:  # one timestep of each kind for all samples
                arguments["temb"] = arguments["temb"].repeat_interleave(len(kept), dim=0)
        split = (self.image_argument, "encoder_hidden_states", "encoder_hidden_states_mask", "temb", "modulate_index")
        return each_sample(run, arguments, kept, split, lambda b: {"image_rotary_emb": (rows[b], tables[1])})
