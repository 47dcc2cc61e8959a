"""Sparse mixtures of experts for diffusion transformers (DiT-MoE, arXiv 2407.11633)."""

from .checkpoint import load, save
from .layer import MoEConfig, Routing, RoutingRecord, SparseMoE, expert_layers, record_routing
from .parallel import clip_grad_norm_, data_parallel, gather_experts, shard_experts
from .presets import PRESETS, count_parameters, dit_moe
from .upcycle import upcycle

__all__ = [
    "PRESETS",
    "MoEConfig",
    "Routing",
    "RoutingRecord",
    "SparseMoE",
    "clip_grad_norm_",
    "count_parameters",
    "data_parallel",
    "dit_moe",
    "expert_layers",
    "gather_experts",
    "load",
    "record_routing",
    "save",
    "shard_experts",
    "upcycle",
]
