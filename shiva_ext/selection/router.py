"""The context-aware token router of Shiva-DiT (arXiv 2602.05605), section 3.3."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shiva_ext import ops


@dataclass(frozen=True)
class RouterConfig:
    """Shape of a :class:`ShivaRouter`; ``dataclasses.asdict`` and ``RouterConfig(**d)`` make the JSON round trip.

    Attributes:
        dim: channels D of the tokens.
        temb_dim: channels of the backbone's timestep embedding.
        pooled_dim: channels of the backbone's pooled prompt embedding.
        num_layers: number L of the model's blocks, the unpruned ones included.
        hidden: width d' of the bottleneck that scores are computed in.
        share: adjacent layers that share one router; 1 gives each its own, ``num_layers`` makes a single one.
        first_layer: the first layer that has a router; the ones before it are never pruned.
        eps: of the LayerNorm.
        layer_dim: channels of the learned layer embedding l.
    """

    dim: int
    temb_dim: int
    pooled_dim: int
    num_layers: int
    hidden: int = 64
    share: int = 2
    first_layer: int = 1
    eps: float = 1e-5
    layer_dim: int = 64

    def __post_init__(self):
        for name in ("dim", "temb_dim", "pooled_dim", "num_layers", "hidden", "share", "layer_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"RouterConfig: {name} is {getattr(self, name)}, wanted at least 1")
        if not 0 <= self.first_layer < self.num_layers:
            raise ValueError(
                f"RouterConfig: first_layer is {self.first_layer}, wanted 0 to {self.num_layers - 1}, "
                "so that at least one layer has a router"
            )


class _SharedRouter(nn.Module):
    """The parameters that one group of layers shares. Only Proj_x has a bias: one bias is all that eq. 9 can use."""

    def __init__(self, config: RouterConfig):
        super().__init__()
        self.proj_x = nn.Linear(config.dim, config.hidden)
        self.proj_t = nn.Linear(config.temb_dim, config.hidden, bias=False)
        self.proj_p = nn.Linear(config.pooled_dim, config.hidden, bias=False)
        self.proj_l = nn.Linear(config.layer_dim, config.hidden, bias=False)
        self.norm = nn.LayerNorm(config.hidden, config.eps)
        # The shape [1, hidden] gives it nn.Linear's initialisation; a bias would shift all scores alike.
        self.out = nn.Linear(config.hidden, 1, bias=False)


class ShivaRouter(nn.Module):
    """Scores the tokens at the entry of each pruned layer; the k largest scores are processed.

    Shiva-DiT (arXiv 2602.05605), eq. 8 and 9, with ``share`` adjacent layers on one set of weights::

        h   = Proj_t(t) + Proj_p(c) + Proj_l(l)
        s_i = w . LayerNorm(SiLU(Proj_x(x_i) + h))

    The context h is computed in float32 whatever autocast says: it shifts all tokens of a row, and its rounding errors
    would reorder near-equal scores.

    Args:
        dim, temb_dim, pooled_dim, num_layers, hidden, share, first_layer, eps, layer_dim: see :class:`RouterConfig`.
    """

    def __init__(self, dim: int, temb_dim: int, pooled_dim: int, num_layers: int, **options):
        super().__init__()
        self.config = config = RouterConfig(dim, temb_dim, pooled_dim, num_layers, **options)
        groups = -(-(config.num_layers - config.first_layer) // config.share)
        self.groups = nn.ModuleList(_SharedRouter(config) for _ in range(groups))
        self.layer_embedding = nn.Parameter(torch.randn(config.num_layers, config.layer_dim))

    def group_sizes(self) -> list[int]:
        """How many layers each shared router scores, in their order."""
        layers = range(self.config.first_layer, self.config.num_layers)
        return [sum(self.group(layer) == group for layer in layers) for group in range(len(self.groups))]

    @classmethod
    def from_config(cls, config: RouterConfig) -> "ShivaRouter":
        """A freshly initialised router of this shape."""
        return cls(**vars(config))

    def group(self, layer: int) -> int:
        """Index of the shared router that scores ``layer``.

        Raises:
            ValueError: the layer does not exist or is never pruned.
        """
        first, last = self.config.first_layer, self.config.num_layers - 1
        if not first <= layer <= last:
            raise ValueError(f"ShivaRouter: layer {layer} has no router, wanted a layer from {first} to {last}")
        return (layer - first) // self.config.share

    def forward(self, layer: int, x: Tensor, timestep_embedding: Tensor, pooled_embedding: Tensor) -> Tensor:
        """Score the tokens at the entry of ``layer``.

        Args:
            layer: index of the block, from 0.
            x: [B,N,D], any floating dtype.
            timestep_embedding: [B,temb_dim], the backbone's own.
            pooled_embedding: [B,pooled_dim], the backbone's own.

        Returns:
            [B,N] float32 (float64 for float64 x).

        Raises:
            ValueError: a layer without a router, or a shape that does not fit the configuration.
        """
        router, config = self.groups[self.group(layer)], self.config
        B = x.shape[0]
        for name, tensor, wanted in (
            ("x", x, (B, x.shape[1] if x.ndim == 3 else "N", config.dim)),
            ("timestep_embedding", timestep_embedding, (B, config.temb_dim)),
            ("pooled_embedding", pooled_embedding, (B, config.pooled_dim)),
        ):
            if tuple(tensor.shape) != wanted:
                raise ValueError(f"ShivaRouter: {name} has shape {tuple(tensor.shape)}, wanted {wanted}")

        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            context = router.proj_x.bias.to(wide) + sum(
                embedding.to(wide) @ projection.weight.to(wide).T
                for embedding, projection in (
                    (timestep_embedding, router.proj_t),
                    (pooled_embedding, router.proj_p),
                    (self.layer_embedding[layer], router.proj_l),
                )
            )
            return ops.router_score(
                x,
                context,
                router.proj_x.weight.to(x.dtype),
                router.norm.weight.to(wide),
                router.norm.bias.to(wide),
                router.out.weight[0].to(wide),
                config.eps,
            )
