"""A sparse mixture of experts in the place of a transformer's MLP (DiT-MoE, arXiv 2407.11633)."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shiva_ext import ops

from .experts import ACTIVATIONS, Experts, feed_forward


@dataclass(frozen=True)
class MoEConfig:
    """What the layers of a mixture have in common.

    Attributes:
        num_experts: n, experts of a layer.
        top_k: K, experts of a token.
        expert_width: inner width of an expert; None: four times the channels, or what the dense MLP has that it takes
            the place of.
        shared_width: inner width of the expert that all tokens pass, 0 for none. DiT-MoE's two shared experts are one
            of twice the channels.
        activation: of all experts: "swiglu" (DiT-MoE's), "geglu", "gelu" or "gelu-approximate".
        bias: whether their linear layers have one.
        capacity_factor: None: no choice is dropped, and shapes depend on data. Else an expert takes at most
            ``ceil(capacity_factor T K / n)`` of a call's T tokens and drops those after: static shapes, which
            ``torch.compile(fullgraph=True)`` needs.
        balance_weight: alpha of the balance loss (equation 5; the paper's best of five).
    """

    num_experts: int = 8
    top_k: int = 2
    expert_width: int | None = None
    shared_width: int = 0
    activation: str = "swiglu"
    bias: bool = False
    capacity_factor: float | None = None
    balance_weight: float = 0.005

    def __post_init__(self):
        if not 1 <= self.num_experts <= 1024:
            raise ValueError(f"num_experts must lie in [1, 1024], got {self.num_experts}")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k must lie in [1, {self.num_experts}], the number of experts, got {self.top_k}")
        if self.expert_width is not None and self.expert_width < 1:
            raise ValueError(f"expert_width must be at least 1, or None, got {self.expert_width}")
        if self.shared_width < 0:
            raise ValueError(f"shared_width must not be negative, got {self.shared_width}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if self.capacity_factor is not None and not 0 < self.capacity_factor < float("inf"):
            raise ValueError(f"capacity_factor must be positive and finite, or None, got {self.capacity_factor}")
        if not 0 <= self.balance_weight < float("inf"):
            raise ValueError(f"balance_weight must not be negative, got {self.balance_weight}")

    def capacity(self, tokens: int) -> int | None:
        """Rows of each expert in a call of so many tokens; None without a limit."""
        if self.capacity_factor is None:
            return None
        return max(1, math.ceil(self.capacity_factor * tokens * self.top_k / self.num_experts - 1e-9))


@dataclass
class Routing:
    """One layer's routing in one call.

    Attributes:
        balance: scalar; ``n / (K T) sum_i count_i mean_i``, 1 where all experts get as much, n / K where K get all
            (equation 5 without alpha). Its gradient reaches the router, and what its tokens come from.
        count: int64 [n], choices of each expert, dropped ones too.
        experts: int64 [T,K], the choices of each token.
        dropped: how many choices found their expert full.
    """

    balance: Tensor
    count: Tensor
    experts: Tensor
    dropped: Tensor


class Router(nn.Linear):
    """Logits of the experts, in float32 at least, whatever runs in half precision around it."""

    def forward(self, tokens: Tensor) -> Tensor:
        """[T,D] -> [T,n]."""
        with torch.autocast(tokens.device.type, enabled=False):
            wide = torch.promote_types(tokens.dtype, torch.float32)
            return F.linear(tokens.to(wide), self.weight.to(wide))


class SparseMoE(nn.Module):
    """``sum over the K best experts of s_i E_i(x)``, plus the shared expert, with s = softmax(W x) as it is.

    Takes and gives [...,D], as diffusers' ``FeedForward`` does; further arguments of its call are not looked at.

    Args:
        dim: D.
        config: see :class:`MoEConfig`.
    """

    def __init__(self, dim: int, config: MoEConfig):
        super().__init__()
        self.dim, self.config = dim, config
        self.router = Router(dim, config.num_experts, bias=False)
        width = config.expert_width or 4 * dim
        self.experts = Experts.new(config.num_experts, dim, width, config.activation, config.bias)
        self.shared = None
        if config.shared_width:
            self.shared = feed_forward(dim, config.shared_width, config.activation, config.bias)
        self.record: list[Routing] | None = None
        self.reduce_balance = None  # set where a batch is shared by processes

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        """hidden_states [...,D] -> [...,D]."""
        n, K = self.config.num_experts, self.config.top_k
        tokens = hidden_states.reshape(-1, self.dim)
        probability = self.router(tokens).softmax(dim=-1)
        experts, _ = ops.topk_select(probability.detach(), K)
        capacity = self.config.capacity(len(tokens))
        rows, place, ends = ops.expert_dispatch(tokens, experts, n, capacity)
        results = self.experts(rows, ends) if capacity is None else self.experts(rows.view(n, capacity, -1))
        out = ops.expert_combine(results.reshape(-1, self.dim), place, probability.gather(1, experts))
        if self.shared is not None:
            out = out + self.shared(tokens)
        if self.record is not None or torch.is_grad_enabled():
            # Not only while recording: gradient checkpointing wants the same graph in the backward, after the record.
            routing = self._routing(probability, experts, place, ends)
            if self.record is not None:
                self.record.append(routing)
        return out.to(hidden_states.dtype).view(hidden_states.shape)

    def _routing(self, probability: Tensor, experts: Tensor, place: Tensor, ends: Tensor) -> Routing:
        count = ends.diff(prepend=ends.new_zeros(1)).long()
        total, seen, tokens = probability.sum(dim=0), count, len(probability)
        if self.reduce_balance is not None:
            total, seen, tokens = self.reduce_balance(total, seen, tokens)
        share = seen.to(total.dtype) * (self.config.num_experts / max(self.config.top_k * tokens, 1))
        return Routing(
            balance=(share * total).sum() / max(tokens, 1), count=count, experts=experts, dropped=(place < 0).sum()
        )

    def extra_repr(self) -> str:
        config = self.config
        limit = "" if config.capacity_factor is None else f", capacity_factor={config.capacity_factor}"
        return f"dim={self.dim}, num_experts={config.num_experts}, top_k={config.top_k}{limit}"


class RoutingRecord:
    """What the layers of a model recorded, by the name of the layer, a :class:`Routing` for each of its calls."""

    def __init__(self, weight: float, layers: dict[str, "SparseMoE"]):
        self.weight = weight
        self.calls: dict[str, list[Routing]] = {name: layer.record for name, layer in layers.items()}
        self.learns = {n: layer.training and layer.router.weight.requires_grad for n, layer in layers.items()}

    def balance_loss(self) -> Tensor:
        """alpha times each layer's balance, averaged over its calls and summed over the layers; add it to the loss.

        Raises:
            RuntimeError: no layer ran inside ``record_routing``, or it has no gradient though the model is in training.
        """
        for name, calls in self.calls.items():
            if self.learns[name] and torch.is_grad_enabled() and not all(call.balance.requires_grad for call in calls):
                raise RuntimeError(
                    f"the routing of {name or 'the layer'} was recorded without a gradient: checkpoint with "
                    "use_reentrant=False, and call the model outside no_grad; or put it in eval mode"
                )
        means = [torch.stack([call.balance for call in calls]).mean() for calls in self.calls.values() if calls]
        if not means:
            raise RuntimeError("no expert layer ran inside record_routing: call the model within the with-block")
        return self.weight * torch.stack(means).sum()

    def load(self) -> dict[str, Tensor]:
        """The share of each layer's choices that went to each expert, float64 [n], by the layer's name."""
        counts = {name: sum(call.count for call in calls) for name, calls in self.calls.items() if calls}
        if not counts:
            raise RuntimeError("no expert layer ran inside record_routing: call the model within the with-block")
        return {name: count.double() / count.sum().clamp_min(1) for name, count in counts.items()}


def expert_layers(model: nn.Module) -> dict[str, SparseMoE]:
    """The mixture's layers by name, in the model's order.

    Raises:
        ValueError: it has none.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseMoE)}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no expert layer; make some with shiva_ext.moe.upcycle(model, MoEConfig())"
        )
    return layers


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Record how the calls within the block are routed::

        with record_routing(transformer) as routing:
            prediction = transformer(...)
        loss = mse_loss(prediction, target) + routing.balance_loss()

    The loss is given back, not hidden in the backward of the layers, so that loss scaling and accumulation treat it as
    they treat the rest (the published code's gradient is lost under fp16 scaling). Records keep the graph: one step a
    block.

    Raises:
        ValueError: the model has no expert layer.
        RuntimeError: a record of this model is open already.
    """
    layers = expert_layers(model)
    if any(layer.record is not None for layer in layers.values()):
        raise RuntimeError("record_routing is open for this model already; close the outer with-block first")
    weights = {layer.config.balance_weight for layer in layers.values()}
    if len(weights) > 1:
        raise ValueError(f"the layers have different balance weights {sorted(weights)}; record them one by one")
    for layer in layers.values():
        layer.record = []
    try:
        yield RoutingRecord(weights.pop(), layers)
    finally:
        for layer in layers.values():
            layer.record = None
