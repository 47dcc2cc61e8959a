"""Tiny models of every family with random weights, what they are called with, and their blocks run by hand."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from diffusers import (
    DiTTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn

import shiva_ext
from shiva_ext.evaluation import flops
from shiva_ext.models import adapter_for
from shiva_ext.selection import RatioTable, ShivaRouter

TEXT, PROMPT = 5, 24


def randomise(model: nn.Module) -> nn.Module:
    """Every weight is random, so that each block does something."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3))
    return model.eval()


def _random(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator)


def _mask(batch: int) -> Tensor:
    mask = torch.ones(batch, TEXT)
    mask[0, 3:] = 0
    return mask


@dataclass
class Family:
    """One family on a tiny scale.

    Attributes:
        build: makes a model, with settings to override.
        inputs: arguments of a call: ``inputs(model, batch, sigma)``.
        on_kept: a block's output for one sample, on its kept tokens [k], with indexing: ``on_kept(block, kept,
            arguments)``.
        flops: counts the operations of a call.
        configs: settings that matter.
        N: image tokens of the inputs.
        text: tokens of the prompt.
        blocks: name of the list of blocks.
    """

    build: Callable[..., nn.Module]
    inputs: Callable[..., dict]
    on_kept: Callable
    flops: Callable[..., int]
    N: int
    configs: dict[str, dict] = field(default_factory=lambda: {"": {}})
    text: int = TEXT
    blocks: str = "transformer_blocks"


def one(value, b: int, B: int):
    """The rows of sample b in an argument that has some for each sample."""
    return value[b::B] if torch.is_tensor(value) and value.ndim > 0 and len(value) in (B, 2 * B) else value


class OnKept(nn.Module):
    """A block that runs on the kept tokens [B,k] of each sample by itself."""

    def __init__(self, family: Family, block: nn.Module, kept: Tensor):
        super().__init__()
        self.family, self.block, self.kept = family, block, kept

    def forward(self, *args, **kwargs):
        names = list(inspect.signature(self.block.forward).parameters)
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        x, B = arguments["hidden_states"], len(self.kept)
        outputs = []
        for b, index in enumerate(self.kept):
            own = {name: one(value, b, B) for name, value in arguments.items()}
            output = self.family.on_kept(self.block, index, own)
            image = output[-1] if isinstance(output, tuple) else output
            whole = x[b : b + 1].clone()
            whole[:, index] = image
            outputs.append((*output[:-1], whole) if isinstance(output, tuple) else whole)
        return (
            tuple(map(torch.cat, zip(*outputs, strict=True))) if isinstance(outputs[0], tuple) else torch.cat(outputs)
        )


@torch.no_grad()
def run_by_hand(family: Family, model: nn.Module, kept: dict[int, Tensor], inputs: dict) -> Tensor:
    blocks = getattr(model, family.blocks)
    for layer, index in kept.items():
        blocks[layer] = OnKept(family, blocks[layer], index)
    return model(**inputs)[0]


# DiT


def build_dit(**overrides) -> nn.Module:
    torch.manual_seed(0)
    config = dict(num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=8, num_layers=4,
                  sample_size=8, num_embeds_ada_norm=10, norm_num_groups=4)  # fmt: skip
    return randomise(DiTTransformer2DModel(**{**config, **overrides}))


def dit_inputs(model, batch: int = 2, sigma: float = 0.7) -> dict:
    return dict(
        hidden_states=_random(1)(batch, 4, 8, 8),
        timestep=torch.full((batch,), int(1000 * sigma)),
        class_labels=torch.arange(batch) + 3,
        return_dict=False,
    )


def dit_on_kept(block, index, own):
    return block(**{**own, "hidden_states": own["hidden_states"][:, index]})


# Sana


def build_sana(**overrides) -> nn.Module:
    torch.manual_seed(0)
    config = dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=32, num_layers=4,
                  num_cross_attention_heads=2, cross_attention_head_dim=32, cross_attention_dim=64,
                  caption_channels=PROMPT, sample_size=4)  # fmt: skip
    return randomise(SanaTransformer2DModel(**{**config, **overrides}))


def sana_inputs(model, batch: int = 2, sigma: float = 0.7) -> dict:
    random = _random(1)
    inputs = dict(
        hidden_states=random(batch, 4, 4, 6),
        encoder_hidden_states=random(batch, TEXT, PROMPT),
        encoder_attention_mask=_mask(batch),
        timestep=torch.full((batch,), 1000 * sigma) * model.config.timestep_scale,
        return_dict=False,
    )
    return inputs | (dict(guidance=torch.full((batch,), 4.5)) if model.config.guidance_embeds else {})


def sana_on_kept(block, index, own):
    """The block's own formula, with an image that is zero where no token was kept before the 3 x 3 convolution."""
    x, H, W = own["hidden_states"][:, index], own["height"], own["width"]
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (
        block.scale_shift_table[None] + own["timestep"].reshape(1, 6, -1)
    ).chunk(6, dim=1)
    x = x + gate * block.attn1(block.norm1(x) * (1 + scale) + shift)
    x = x + block.attn2(
        x, encoder_hidden_states=own["encoder_hidden_states"], attention_mask=own["encoder_attention_mask"]
    )
    entry = (block.norm2(x) * (1 + scale_mlp) + shift_mlp).transpose(1, 2).unsqueeze(3)
    wide = nn.functional.silu(block.ff.conv_inverted(entry)).squeeze(3)
    image = torch.zeros(1, wide.shape[1], H * W)
    image[:, :, index] = wide
    out = block.ff.conv_depth(image.view(1, -1, H, W)).flatten(2)[:, :, index]
    value, gated = out.chunk(2, dim=1)
    out = block.ff.conv_point((value * nn.functional.silu(gated)).unsqueeze(3)).squeeze(3).transpose(1, 2)
    return x + gate_mlp * out


# Qwen-Image


def build_qwen(**overrides) -> nn.Module:
    torch.manual_seed(0)
    config = dict(patch_size=2, in_channels=16, out_channels=4, num_layers=4, attention_head_dim=16,
                  num_attention_heads=2, joint_attention_dim=PROMPT, axes_dims_rope=(4, 6, 6))  # fmt: skip
    return randomise(QwenImageTransformer2DModel(**{**config, **overrides}))


def qwen_inputs(model, batch: int = 2, sigma: float = 0.7) -> dict:
    random = _random(1)
    shapes = [[(1, 4, 4)] if not model.config.zero_cond_t else [(1, 2, 4), (1, 2, 4)]] * batch
    return dict(
        hidden_states=random(batch, 16, 16),
        encoder_hidden_states=random(batch, TEXT, PROMPT),
        encoder_hidden_states_mask=_mask(batch),
        timestep=torch.full((batch,), sigma),
        img_shapes=shapes,
        return_dict=False,
    )


def qwen_on_kept(block, index, own):
    image, text = own["image_rotary_emb"]
    own = {**own, "hidden_states": own["hidden_states"][:, index], "image_rotary_emb": (image[index], text)}
    if own.get("modulate_index") is not None:
        own["modulate_index"] = own["modulate_index"][:, index]
    return block(**own)


# Wan


def build_wan(**overrides) -> nn.Module:
    torch.manual_seed(0)
    config = dict(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
                  text_dim=PROMPT, freq_dim=32, ffn_dim=64, num_layers=4, rope_max_seq_len=32)  # fmt: skip
    return randomise(WanTransformer3DModel(**{**config, **overrides}))


def wan_inputs(model, batch: int = 2, sigma: float = 0.7, each_token: bool = False) -> dict:
    random = _random(1)
    timestep = torch.full((batch,), 1000 * sigma)
    if each_token:  # the first frame is given
        timestep = timestep[:, None].repeat(1, 24)
        timestep[:, :8] = 0
    return dict(
        hidden_states=random(batch, 4, 3, 4, 8),
        timestep=timestep,
        encoder_hidden_states=random(batch, TEXT, PROMPT),
        return_dict=False,
    )


def wan_on_kept(block, index, own):
    tables, temb = tuple(table[:, index] for table in own["rotary_emb"]), own["temb"]
    temb = temb[:, index] if temb.ndim == 4 else temb
    return block(**{**own, "hidden_states": own["hidden_states"][:, index], "rotary_emb": tables, "temb": temb})


FAMILIES = {
    "dit": Family(build_dit, dit_inputs, dit_on_kept, flops.dit_forward_flops, N=16, text=0),
    "sana": Family(
        build_sana, sana_inputs, sana_on_kept, flops.sana_forward_flops, N=24,
        configs={"": {}, "guidance": dict(guidance_embeds=True), "scaled time": dict(timestep_scale=0.001),
                 "norms, wide cross-attention": dict(qk_norm="rms_norm_across_heads", norm_elementwise_affine=True)},
    ),
    "qwenimage": Family(
        build_qwen, qwen_inputs, qwen_on_kept, flops.qwenimage_forward_flops, N=16,
        configs={"": {}, "edit": dict(zero_cond_t=True)},
    ),
    "wan": Family(build_wan, wan_inputs, wan_on_kept, flops.wan_forward_flops, N=24, blocks="blocks"),
}  # fmt: skip


def table(layers: int) -> RatioTable:
    ratios = 0.2 + 0.7 * torch.rand(5, layers, generator=torch.Generator().manual_seed(3))
    ratios[:, 0] = 1
    return RatioTable(torch.linspace(0.1, 0.9, 5), ratios)


def make_artifact(model: nn.Module, schedule: RatioTable | None = None, **options) -> shiva_ext.ShivaArtifact:
    torch.manual_seed(2)
    dims = adapter_for(model).dims(model)
    router = ShivaRouter(**dims, hidden=16).eval().requires_grad_(False)
    schedule = schedule or RatioTable.fixed(0.6, dims["num_layers"])
    return shiva_ext.ShivaArtifact(type(model).__name__, router, schedule, **options)
