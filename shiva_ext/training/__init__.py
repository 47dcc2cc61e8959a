"""Training a router, a ratio policy and adapters against the frozen dense model."""

from .losses import distillation_loss, distilled_layers, feature_distance
from .sampling import shared_ratios, stratified_ratios, stratified_timesteps

__all__ = [
    "distillation_loss",
    "distilled_layers",
    "feature_distance",
    "shared_ratios",
    "stratified_ratios",
    "stratified_timesteps",
]
