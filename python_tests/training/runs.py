"""A tiny training run that the tests of resuming and of several processes share."""

from dataclasses import replace
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel

from shiva_ext.training.config import TrainConfig
from shiva_ext.training.trainer import Batch, ShivaTrainer

CONFIG = TrainConfig(
    router_steps=4,
    policy_steps=4,
    joint_steps=4,
    batch_size=8,
    micro_batches=4,
    adapter_rank=2,
    output_weight=1.0,
    lr_router=1e-2,
    lr_policy=1e-2,
    lr_adapter=1e-2,
    precision="fp32",
    log_every=3,
    checkpoint_every=3,
)


def tiny_model() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=1, out_channels=1, num_layers=3, num_attention_heads=1,
        attention_head_dim=32, joint_attention_dim=16, caption_projection_dim=32, pooled_projection_dim=16,
        pos_embed_max_size=4,
    )  # fmt: skip
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return model.eval().requires_grad_(False)


def next_batch(count: int, generator: torch.Generator) -> Batch:
    def draw(*shape):
        return torch.randn(count, *shape, generator=generator)

    return Batch(draw(1, 8, 8), dict(encoder_hidden_states=draw(3, 16), pooled_projections=draw(16)))


def make_trainer(source=next_batch, **changes) -> ShivaTrainer:
    return ShivaTrainer(tiny_model(), replace(CONFIG, **changes), source)


def everything(trainer: ShivaTrainer) -> dict[str, torch.Tensor]:
    """All that a run has learned."""
    found = {f"router.{k}": v.clone() for k, v in trainer.router.state_dict().items()}
    found |= {f"schedule.{k}": v.clone() for k, v in trainer.schedule.state_dict().items()}
    found["mu"] = trainer.budget_loss.mu.clone()
    return found | {f"adapter.{k}": v.detach().clone() for k, v in trainer._adapter_weights().items()}


def losses(trainer: ShivaTrainer) -> list[dict]:
    """The history without times."""
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in trainer.history]


def finish(folder: Path, **changes) -> ShivaTrainer:
    """Run to the end, from the newest checkpoint if there is one."""
    trainer = make_trainer(**changes)
    trainer.run(folder, resume=True)
    return trainer
