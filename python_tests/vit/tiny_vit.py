"""A ViT and a DeiT with random weights: 6 blocks, 16 patches, 32 channels."""

import torch
from transformers import DeiTConfig, DeiTForImageClassification, ViTConfig, ViTForImageClassification

from shiva_ext.vit import (
    DynamicViTConfig,
    PatchConfig,
    PatchPruner,
    RandomPatchConfig,
    ShivaViTConfig,
    TNTConfig,
)

WIDTH, PATCHES, DEPTH = 32, 16, 6
EVERY = [
    TNTConfig(0.5, (2,), norm_in_eval=False),
    TNTConfig(0.5, (1, 3), similar=4),
    DynamicViTConfig(0.5, (1, 3)),
    ShivaViTConfig(0.5, (1, 2, 4)),
    RandomPatchConfig(0.5, (2,)),
    RandomPatchConfig(0.5, (2, 3), pass_by=True),
]


def make_vit(deit: bool = False, seed: int = 0, **options):
    torch.manual_seed(seed)
    config = DeiTConfig if deit else ViTConfig
    model = DeiTForImageClassification if deit else ViTForImageClassification
    sizes = dict(hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=2, intermediate_size=64)
    sizes |= dict(image_size=8, patch_size=2, num_channels=1, num_labels=3, initializer_range=0.3)
    return model(config(**sizes | options)).eval()


def make_pruner(config: PatchConfig, seed: int = 1, width: int = WIDTH) -> PatchPruner:
    torch.manual_seed(seed)
    pruner = PatchPruner(config, width)
    with torch.no_grad():
        for parameter in pruner.heads.parameters():
            parameter.normal_()
    return pruner.eval()


def make_images(batch: int = 3, seed: int = 2) -> torch.Tensor:
    return torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
