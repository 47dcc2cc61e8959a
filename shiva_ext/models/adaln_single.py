"""Blocks with self-attention, cross-attention and an MLP, modulated by a table and what all blocks are given."""

from torch import Tensor, nn

from .base import ModelAdapter


class AdaLNSingleAdapter(ModelAdapter):
    """What PixArt and Sana share.

    Attributes:
        mlp_gives: what the MLP's output holds, see :meth:`~.base.ModelAdapter.cache_sites`.
    """

    row_arguments = ("hidden_states", "encoder_hidden_states", "timestep", "attention_mask", "encoder_attention_mask")
    mlp_gives = "image"

    def cache_sites(self, block: nn.Module) -> dict[str, list]:
        cross = {} if block.attn2 is None else {"cross_attention": [(block.attn2, ("image",))]}
        return {"attention": [(block.attn1, ("image",))], **cross, "mlp": [(block.ff, (self.mlp_gives,))]}

    def modulated_input(self, block: nn.Module, x: Tensor, arguments: dict) -> Tensor:
        timestep = arguments["timestep"]  # [B,6D]
        shift, scale = (block.scale_shift_table[None] + timestep.reshape(len(timestep), 6, -1))[:, :2].chunk(2, dim=1)
        return block.norm1(x) * (1 + scale) + shift
