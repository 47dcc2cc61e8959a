"""Experts from a dense checkpoint."""

from dataclasses import replace

import torch
from diffusers.models.activations import GEGLU, GELU, SwiGLU
from diffusers.models.attention import FeedForward
from torch import nn

from .experts import GATED
from .layer import MoEConfig, SparseMoE


def _dense_layers(model: nn.Module) -> dict[str, FeedForward]:
    """The MLPs of the blocks' image tokens: ``ff`` of every block of ``transformer_blocks``, by name."""
    blocks = getattr(model, "transformer_blocks", ())
    found = {f"transformer_blocks.{i}.ff": getattr(block, "ff", None) for i, block in enumerate(blocks)}
    return {name: layer for name, layer in found.items() if isinstance(layer, FeedForward)}


def _activation(name: str, layer: FeedForward) -> str:
    first = layer.net[0]
    if type(first) is GELU:
        return "gelu" if first.approximate == "none" else "gelu-approximate"
    if type(first) in (GEGLU, SwiGLU):
        return "geglu" if type(first) is GEGLU else "swiglu"
    raise ValueError(
        f"{name} has the activation {type(first).__name__}; experts can have GELU, GEGLU and SwiGLU of diffusers"
    )


def routed_share(num_experts: int, top_k: int, std: float) -> float:
    """The mean of the K largest of a softmax over n normal logits of that deviation, summed; K / n at 0."""
    generator = torch.Generator().manual_seed(0)
    logits = std * torch.randn(8192, num_experts, generator=generator, dtype=torch.float64)
    return logits.softmax(dim=1).topk(top_k, dim=1).values.sum(dim=1).mean().item()


def _experts_of(name: str, dense: FeedForward, config: MoEConfig, generator: torch.Generator, std: float) -> SparseMoE:
    """Each expert takes ``expert_width`` hidden units of the dense MLP: all, or a random choice of its own."""
    inner, outer = dense.net[0].proj, dense.net[2]
    dim, hidden = inner.in_features, outer.in_features
    width = config.expert_width or hidden
    if width > hidden:
        raise ValueError(f"expert_width is {width}, but {name} has only {hidden} hidden units to take")
    config = replace(config, expert_width=width)
    layer = SparseMoE(dim, config).to(inner.weight)
    # So that the sum of K experts, each weighed by its part of the softmax, begins as the dense MLP does in the mean.
    scale = hidden / width / routed_share(config.num_experts, config.top_k, std * dim**0.5)
    gated = config.activation in GATED
    with torch.no_grad():
        layer.router.weight.copy_(torch.randn(layer.router.weight.shape, generator=generator) * std)
        for expert in range(config.num_experts):
            unit = torch.randperm(hidden, generator=generator)[:width].sort().values.to(inner.weight.device)
            rows = torch.cat([unit, hidden + unit]) if gated else unit
            layer.experts.w_in[expert] = inner.weight[rows]
            layer.experts.w_out[expert] = outer.weight[:, unit] * scale
            if config.bias:
                layer.experts.b_in[expert] = inner.bias[rows]
                layer.experts.b_out[expert] = outer.bias * (scale * width / hidden)
        if layer.shared is not None:  # begins at nothing, so that it adds nothing yet
            nn.init.zeros_(layer.shared[-1].weight)
            if config.bias:
                nn.init.zeros_(layer.shared[-1].bias)
    return layer


def upcycle(
    model: nn.Module,
    config: MoEConfig | None = None,
    *,
    layers: list[int] | None = None,
    router_std: float = 0.02,
    seed: int = 0,
) -> dict[str, SparseMoE]:
    """Put experts in the place of a dense model's MLPs, made of their weights (Komatsuzaki et al., arXiv 2212.05055).

    Every expert takes the dense MLP's hidden units: all of them, as DiT-MoE's own script does, or, with a smaller
    ``expert_width``, a random choice. With half of them and two experts a token the compute stays what it was. Second
    layers are scaled so that a token's weighted sum begins as the dense output in the mean; the router is random.
    Dropout is not carried over.

    Args:
        model: a diffusers transformer with ``transformer_blocks`` whose ``ff`` is a ``FeedForward``: SD3, PixArt, DiT,
            Flux (its double blocks). Changed in place, or not at all if something is refused.
        config: its ``activation`` and ``bias`` are taken from the dense MLPs.
        layers: indices of the blocks that get experts; all by default. The paper found the deep half better than the
            shallow one.
        router_std: deviation of the router's weights.
        seed: of the routers, and of the choice of hidden units.

    Returns:
        The new layers by name; :func:`~shiva_ext.moe.record_routing` gives their balance loss.

    Raises:
        ValueError: no such MLP, one of another activation, a layer that is not there, too great an ``expert_width``.
    """
    config = config or MoEConfig()
    dense = _dense_layers(model)
    if not dense:
        why = "its blocks have experts already" if has_experts(model) else "no block has a FeedForward called ff"
        raise ValueError(f"{type(model).__name__} cannot be upcycled: {why}")
    if layers is not None:
        if not layers:
            raise ValueError("layers is empty; name the blocks that get experts, or leave it out for all")
        names = [f"transformer_blocks.{i}.ff" for i in layers]
        if missing := [name for name in names if name not in dense]:
            raise ValueError(f"there is no dense {', '.join(missing)}; there are {', '.join(dense)}")
        dense = {name: dense[name] for name in names}
    generator, made = torch.Generator().manual_seed(seed), {}
    for name, layer in dense.items():
        own = replace(config, activation=_activation(name, layer), bias=layer.net[0].proj.bias is not None)
        made[name] = _experts_of(name, layer, own, generator, router_std).train(layer.training)
    for name, layer in made.items():
        model.set_submodule(name, layer)
    return made


def has_experts(model: nn.Module) -> bool:
    return any(isinstance(module, SparseMoE) for module in model.modules())


def install_experts(model: nn.Module, layers: dict[str, tuple[int, MoEConfig]]) -> None:
    """Put fresh expert layers, ``{name: (channels, config)}``, in the place of what the model has there."""
    for name, (dim, config) in layers.items():
        model.set_submodule(name, SparseMoE(dim, config))
