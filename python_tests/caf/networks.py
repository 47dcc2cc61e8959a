"""Tiny networks of CAF: random ones of each family, and ones that know the answer."""

import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel
from torch import Tensor

from shiva_ext.caf import CAFPipeline, CAFScheduler, Pairs, widen_input

CHANNELS, SIDE, TEXT = 2, 8, 16


def filled(model):
    """No weight is 0, so that each part does something."""
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return model.eval()


def make_sd3(cls=SD3Transformer2DModel):
    torch.manual_seed(0)
    return filled(
        cls(
            sample_size=SIDE, patch_size=2, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=2,
            num_attention_heads=1, attention_head_dim=32, joint_attention_dim=TEXT, caption_projection_dim=32,
            pooled_projection_dim=TEXT, pos_embed_max_size=4,
        )
    )  # fmt: skip


def make_pixart():
    torch.manual_seed(0)
    return filled(
        PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=CHANNELS, out_channels=2 * CHANNELS, num_layers=2,
            cross_attention_dim=32, caption_channels=TEXT, sample_size=SIDE, use_additional_conditions=False,
        )
    )  # fmt: skip


def make_dit():
    torch.manual_seed(0)
    return filled(
        DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=CHANNELS, num_layers=2, sample_size=SIDE,
            num_embeds_ada_norm=5,
        )
    )  # fmt: skip


FAMILIES = {"sd3": make_sd3, "pixart": make_pixart, "dit": make_dit}


def draw(*shape: int, seed: int = 0, dtype=torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def prompts(batch: int, seed: int = 5) -> dict[str, Tensor]:
    """What a pipeline on SD3 is called with."""
    return dict(prompt_embeds=draw(batch, 3, TEXT, seed=seed), pooled_prompt_embeds=draw(batch, TEXT, seed=seed + 1))


def conditions(family: str, batch: int) -> dict[str, Tensor]:
    """A transformer's further arguments."""
    if family == "dit":
        return dict(class_labels=torch.arange(batch) % 5)
    tokens = dict(encoder_hidden_states=draw(batch, 3, TEXT, seed=5))
    return tokens if family == "pixart" else tokens | dict(pooled_projections=draw(batch, TEXT, seed=6))


def condition(labels: Tensor) -> dict[str, Tensor]:
    """Of the trainings: every label has a prompt of its own."""
    table = draw(4, 4, TEXT, seed=9)[labels]
    return dict(encoder_hidden_states=table[:, :3], pooled_projections=table[:, 3])


def make_pairs_of(count: int = 12) -> Pairs:
    """Pairs that no teacher made, for trainings."""
    noise = draw(count, CHANNELS, SIDE, SIDE, seed=1)
    return Pairs(noise, noise.tanh(), torch.arange(count) % 4, dict(teacher="tanh", chunk=count))


class Oracle(SD3Transformer2DModel):
    """Puts out ``answer``, whatever it is asked, and keeps the shares of data that it was told of, 0 for noise."""

    def tell(self, answer: Tensor):
        self.answer, self.shares = answer, []
        return self

    def forward(self, hidden_states, timestep=None, encoder_hidden_states=None, pooled_projections=None, **options):
        self.shares.append([round(1 - each / 1000, 6) for each in timestep.tolist()])
        return (self.answer,)


def make_pipeline(velocity=None, acceleration=None, vae=None, h: float = 1.5) -> CAFPipeline:
    """Random networks unless others are given."""
    velocity = make_sd3() if velocity is None else velocity
    acceleration = filled(widen_input(velocity)) if acceleration is None else acceleration
    pipe = CAFPipeline(velocity, acceleration.eval(), CAFScheduler(h), vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_oracles(x0: Tensor, x1: Tensor, h: float) -> CAFPipeline:
    """A pipeline whose networks know v0 = h (x1 - x0) and a + 2 v0 = 2 (x1 - x0)."""
    v0 = h * (x1 - x0)
    velocity = make_sd3(Oracle).tell(v0)
    return make_pipeline(velocity, widen_input(velocity).tell(2 * (x1 - x0)), h=h)
