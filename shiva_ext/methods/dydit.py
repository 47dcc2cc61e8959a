"""DyDiT: heads and channels that a noise level does not need are left out, and tokens that need no MLP pass it by."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models import ModelAdapter
from .base import ATTENTION, MLP, MLP_NORM, BlockCall
from .parts import attention, check_parts, feed_forward
from .trained import TrainedMethod, linear32, straight_through


def _head_weights(attn: nn.Module) -> Tensor:
    """How large what a head reads and writes is, [H]: the norm of its values' weights times that of its output's."""
    size = attn.to_v.out_features // attn.heads
    read = attn.to_v.weight.float().unflatten(0, (-1, size)).flatten(1).norm(dim=1)
    return read * attn.to_out[0].weight.float().unflatten(1, (-1, size)).transpose(0, 1).flatten(1).norm(dim=1)


def _channel_weights(ff: nn.Module) -> Tensor:
    """The same of hidden channels, [hidden]."""
    return ff.net[0].proj.weight.float().norm(dim=1) * ff.net[2].weight.float().norm(dim=0)


class BlockRouters(nn.Module):
    """A block's three gates.

    Attributes:
        heads: timestep embedding to the logits of all heads but the weightiest, which always runs.
        channels: the same to those of all groups of hidden channels but the weightiest.
        down, up: token [D] to D/16 to the logit of its MLP.
        head_order, channel_order: heads and hidden channels by falling weight; groups are stretches of the latter.
        attentions: how many attention modules the block has.
    """

    def __init__(
        self,
        dim: int,
        temb_dim: int,
        head_weights: Tensor,
        channel_weights: Tensor,
        groups: int,
        biases: tuple[float, float],
        attentions: int,
    ):
        super().__init__()
        heads, (width_bias, token_bias) = len(head_weights), biases
        self.attentions, self.groups = attentions, groups
        self.register_buffer("head_order", head_weights.argsort(descending=True))
        self.register_buffer("channel_order", channel_weights.argsort(descending=True))
        self.heads, self.channels = nn.Linear(temb_dim, heads - 1), nn.Linear(temb_dim, groups - 1)
        self.down, self.up = nn.Linear(dim, max(dim // 16, 1)), nn.Linear(max(dim // 16, 1), 1)
        for layer, bias in ((self.heads, width_bias), (self.channels, width_bias), (self.up, token_bias)):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.constant_(layer.bias, bias)

    def open_channels(self, gate: Tensor) -> Tensor:
        """The hidden channels of the groups whose gate [G] is open, int64."""
        return self.channel_order.view(self.groups, -1)[gate > 0].flatten()

    def channel_mask(self, gates: Tensor) -> Tensor:
        """Gates of groups [B,G] as those of hidden channels [B,hidden]."""
        spread = gates.repeat_interleave(len(self.channel_order) // self.groups, dim=1)
        return spread[:, self.channel_order.argsort()]

    def token_logits(self, x: Tensor) -> Tensor:
        """[B,N,D] to [B,N]."""
        return linear32(self.up, F.relu(linear32(self.down, x)))[..., 0]


@dataclass(frozen=True)
class DyDiT(TrainedMethod):
    """Dynamic diffusion transformer (arXiv 2410.03456; code github.com/alibaba-damo-academy/DyDiT).

    Routers on the timestep embedding leave out attention heads and groups of the MLP's channels, sorted by the size of
    their weights, the first of which always run; a router on each token after attention lets it pass the MLP by.
    Nothing of attention is left out for a token. In training the gates are Gumbel sigmoids, hard forwards, and a loss
    pulls the operations to their share.

    Attributes:
        budget: wanted share of the blocks' operations (lambda).
        groups: of the MLP's hidden channels; 0 is as many as heads.
        tau: temperature of the gates in training.
        width_bias, token_bias: of the fresh routers. Published are 15 and 35, for some hundred thousand steps; some
            thousand do not get down from there.
        flops_weight: factor of the squared distance of the operations to their share.
        ramp: share of the training in which the wanted share falls from 1; published are 1,000 of 200,000 steps, a
            fifth is ours for short runs.
        complete: share of the training in which the model with all gates open is trained, too.
        threshold: a gate is open from this probability on; 1/2 as published, more leaves out more.
        first_layer: blocks before it stay dense.
    """

    budget: float = 0.6
    groups: int = 0
    tau: float = 5.0
    width_bias: float = 5.0
    token_bias: float = 5.0
    flops_weight: float = 2.0
    ramp: float = 0.2
    complete: float = 0.15
    threshold: float = 0.5
    first_layer: int = 0

    sites, needs_grid = (ATTENTION, MLP, MLP_NORM), False
    note = "DyDiT's noise level and image decide what it leaves out: it saves at least what these numbers say"
    training_only = ("budget", "tau", "width_bias", "token_bias", "flops_weight", "ramp", "complete")

    def __post_init__(self):
        for name in ("budget", "threshold"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"DyDiT: {name} is {getattr(self, name)}, wanted a share above 0 and at most 1")
        if self.groups == 1 or self.groups < 0:
            raise ValueError(f"DyDiT: groups is {self.groups}, wanted 0 (as many as heads) or at least 2")

    @classmethod
    def for_budget(cls, budget: float, adapter: ModelAdapter, transformer: nn.Module) -> "DyDiT":
        # With a few wide heads their number would be too coarse for the MLP.
        heads = adapter.merge_sites(adapter.blocks(transformer)[0])["attention"][0].heads
        return cls(budget=budget, groups=0 if heads >= 8 else 8)

    def build(self, adapter: ModelAdapter, transformer: nn.Module) -> nn.ModuleList:
        check_parts("DyDiT", adapter, transformer)
        dims, found = adapter.dims(transformer), []
        for block in adapter.blocks(transformer):
            sites = adapter.merge_sites(block)
            heads, hidden = sites["attention"][0].heads, sites["mlp"][0].net[2].in_features
            groups = self.groups or heads
            if heads < 2 or hidden % groups:
                raise ValueError(
                    f"DyDiT: {heads} heads and {groups} groups of {hidden} channels, wanted at least 2 heads, and "
                    "groups that divide the channels; give groups="
                )
            weights = _head_weights(sites["attention"][0]), _channel_weights(sites["mlp"][0])
            biases = self.width_bias, self.token_bias
            found.append(BlockRouters(dims["dim"], dims["temb_dim"], *weights, groups, biases, len(sites["attention"])))
        return nn.ModuleList(found)

    def dense_weight(self, progress: float) -> float:
        return 1.0 if progress < self.complete else 0.0

    def wanted(self, progress: float) -> float:
        """Share of the operations that is aimed at after this share of the training."""
        return 1 - (1 - self.budget) * min(1.0, progress / self.ramp if self.ramp else 1.0)

    def penalty(self, weights: nn.Module, scratch, progress: float) -> Tensor:
        """(mean over samples of F_dynamic / F_static - wanted)^2."""
        dynamic, static = (sum(each[i] for each in scratch["flops"].values()) for i in (0, 1))
        return self.flops_weight * ((dynamic / static).mean() - self.wanted(progress)).square()

    def gate(self, logits: Tensor, training: bool) -> Tensor:
        """Open (1) or closed (0) for each logit; in training a Gumbel sigmoid with a straight-through gradient."""
        if not training:
            return (torch.sigmoid(logits) > self.threshold).float()
        gumbel = -torch.log(torch.empty(2, *logits.shape, device=logits.device).exponential_())
        soft = torch.sigmoid((logits + gumbel[0] - gumbel[1]) / self.tau)
        return straight_through((soft > 0.5).float(), soft)

    def widths(self, call: BlockCall) -> tuple[Tensor, Tensor]:
        """Gates of heads [B,H], in the model's order, and of channel groups [B,G]: the noise level's."""
        routers, temb = call.weights[call.layer], call.conditioning.timestep_embedding
        found = []
        for layer in (routers.heads, routers.channels):
            gate = self.gate(linear32(layer, temb), call.training)
            found.append(torch.cat([torch.ones_like(gate[:, :1]), gate], dim=1))
        return found[0][:, routers.head_order.argsort()], found[1]

    def run_block(self, call: BlockCall):
        heads, channels = self.widths(call)
        planned = _Masked if call.training else _Sliced
        plan = planned(self, call, heads, channels)
        output = call.with_plan({ATTENTION: plan.attention, MLP_NORM: plan.norm, MLP: plan.mlp})
        B, N, D = call.x.shape
        # Multiply-adds of a block: attention 4ND^2 + 2N^2D, MLP 8ND^2.
        of_attention = call.weights[call.layer].attentions * (4 * N * D * D + 2 * N * N * D)
        of_mlp = 8 * N * D * D
        dynamic = heads.mean(1) * of_attention + channels.mean(1) * plan.tokens.float().mean(1) * of_mlp
        call.scratch.setdefault("flops", {})[call.layer] = (dynamic, float(of_attention + of_mlp))
        return output


class _Masked:
    """A block in training: everything is computed, and multiplied by its gate."""

    def __init__(self, method: DyDiT, call: BlockCall, heads: Tensor, channels: Tensor):
        self.method, self.call, self.heads, self.channels = method, call, heads, channels
        self.routers, self.tokens = call.weights[call.layer], None

    def attention(self, module, forward, x, text=None):
        return attention(module, x, text, mask=self.heads)

    def norm(self, module, forward, x, *args, **kwargs):
        self.tokens = self.method.gate(self.routers.token_logits(x), self.call.training)
        return forward(x, *args, **kwargs)

    def mlp(self, module, forward, x):
        mask = self.routers.channel_mask(self.channels)[:, None]
        return feed_forward(module, x, mask=mask) * self.tokens[..., None].to(x.dtype)


class _Sliced(_Masked):
    """A block after training: only what is open is computed. All samples of a call have one noise level."""

    def attention(self, module, forward, x, text=None):
        if bool(self.heads[0].all()):
            return forward(x) if text is None else forward(x, encoder_hidden_states=text)
        return attention(module, x, text, heads=self.heads[0].nonzero()[:, 0])

    def mlp(self, module, forward, x):
        columns = None if bool(self.channels[0].all()) else self.routers.open_channels(self.channels[0])
        if columns is None and bool(self.tokens.all()):
            return forward(x)
        # An MLP knows no neighbours: the open tokens of all samples are one list of rows.
        rows = self.tokens.flatten().nonzero()[:, 0]
        flat = x.flatten(0, 1)
        y = feed_forward(module, flat.index_select(0, rows), columns=columns)
        return y.new_zeros(flat.shape).index_copy(0, rows, y).view_as(x)
