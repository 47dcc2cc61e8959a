"""Patches leave a transformers vision transformer between its blocks, or pass by some of them."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shiva_ext import ops

from .config import DynamicViTConfig, PatchConfig, RandomPatchConfig, ShivaViTConfig, TNTConfig
from .pruner import PatchPruner
from .similarity import drop_similar

PREFIX = {"ViTModel": 1, "DeiTModel": 2}  # tokens in front of the patches: class token, DeiT's distillation token
_HANDLE = "_shiva_ext_patches"
_HIDDEN = 1e-6  # what a hidden patch's weight in the attention is multiplied by; its gradient is that of zero


class ViTHandle:
    """What :func:`shiva_ext.enable` returns for a vision transformer.

    In training mode the model runs as its method trains, with gradients to the heads; in eval mode patches go.

    Attributes:
        model: the hooked model.
        pruner: what is learned.
        kept: of the last call, the patches [B,k] int64, ascending, that each pruned block was left with, by block.
        lengths: tokens that each block of the last call worked on, class token included.
    """

    def __init__(self, model: nn.Module, pruner: PatchPruner, base: nn.Module, prefix: int):
        self.model, self.pruner, self.base, self.prefix = model, pruner, base, prefix
        self.kept: dict[int, Tensor] = {}
        self.lengths: list[int] = []
        self._place: Tensor | None = None  # [B,n] patches that are left; None for all of them
        self._shown: Tensor | None = None  # [B,n] in {0,1}, DynamicViT's, straight through
        self._losses: list[Tensor] = []
        self._before: list[tuple[nn.Module, object]] = []

    def disable(self) -> None:
        """Give the model all of its patches again. Harmless if done before."""
        while self._before:
            layer, forward = self._before.pop()
            del layer.forward
            if forward is not None:
                layer.forward = forward
        if getattr(self.model, _HANDLE, None) is self:
            delattr(self.model, _HANDLE)

    def __enter__(self) -> "ViTHandle":
        return self

    def __exit__(self, *error) -> None:
        self.disable()

    def loss(self) -> Tensor:
        """What the last call in training mode asks to be minimised beside the task's loss; 0 where it asks nothing."""
        return torch.stack(self._losses).sum() if self._losses else torch.zeros(())

    def _attach(self) -> None:
        # Partials of bound methods alone: a deepcopy of the model then has those of its own handle.
        for index, layer in enumerate(blocks(self.base)):
            self._before.append((layer, layer.__dict__.get("forward")))
            layer.forward = partial(self._forward, index)

    # ---- a block

    def _run(self, index: int, hidden: Tensor, mask: Tensor | None, kwargs: dict):
        layer, forward = self._before[index]
        self.lengths.append(hidden.shape[1])
        own = partial(type(layer).forward, layer) if forward is None else forward
        return own(hidden, mask, **kwargs) if mask is not None else own(hidden, **kwargs)

    def _forward(self, index: int, hidden_states: Tensor, attention_mask: Tensor | None = None, *rest, **kwargs):
        if attention_mask is not None or rest:
            raise ValueError("shiva_ext: attention or head masks cannot be given to a model whose patches are pruned")
        config, hidden = self.pruner.config, hidden_states
        if hidden.shape[-1] != self.pruner.width:
            raise ValueError(f"shiva_ext: the pruner is for {self.pruner.width} channels, got {hidden.shape[-1]}")
        if index == 0:
            self.kept, self.lengths, self._losses = {}, [], []
            self._place = self._shown = None
            if isinstance(config, TNTConfig) and config.similar and len(config.layers) > 1 and not self.base.training:
                hidden = self._stay(index, hidden, self._unlike(hidden[:, self.prefix :], config.similar))
        if _passes_by(config) and index in config.layers:
            return self._pass_by(index, hidden, kwargs)
        out = self._run(index, hidden, self._hiding(), kwargs)
        whole = isinstance(out, tuple)
        after = self._after(index, out[0] if whole else out)
        return (after, *out[1:]) if whole else after

    def _after(self, index: int, out: Tensor) -> Tensor:
        config, training = self.pruner.config, self.base.training
        if isinstance(config, TNTConfig) and index < config.sites:
            scores = self.pruner.scores(index, out[:, self.prefix :])  # of the block's output, before the norm
            if training:
                return self._noisy(self._normed(out), scores)
            if config.norm_in_eval:
                out = self._normed(out)
            return self._keep_best(index, out, scores) if index in config.layers else out
        if index not in config.layers or _passes_by(config):
            return out
        if isinstance(config, RandomPatchConfig):
            return self._stay(index, out, self._at_random(index, out[:, self.prefix :]))
        scores = self.pruner.scores(index, out[:, self.prefix :])
        if training:
            self._draw(index, scores)
            return out
        return self._keep_best(index, out, scores)

    # ---- patches that go

    def _stay(self, index: int, hidden: Tensor, kept: Tensor) -> Tensor:
        """hidden with the kept [B,k] patches alone, of those that are left."""
        self._place = kept if self._place is None else self._place.gather(1, kept)
        self.kept[index] = self._place
        patches = ops.token_gather(hidden[:, self.prefix :], kept.contiguous())
        return torch.cat([hidden[:, : self.prefix], patches], dim=1)

    def _keep_best(self, index: int, hidden: Tensor, scores: Tensor) -> Tensor:
        config, patches = self.pruner.config, hidden[:, self.prefix :]
        n = patches.shape[1]
        similar = getattr(config, "similar", 0) if len(config.layers) == 1 else 0
        count = config.count(n)
        if count + similar > n:
            raise ValueError(f"shiva_ext: {count} patches and similar={similar} are wanted of {n}; lower one of them")
        kept = ops.topk_select(scores, count + similar)[0]
        if similar:
            best = ops.token_gather(patches, kept)
            kept = kept.gather(1, self._unlike(best, similar))
        return self._stay(index, hidden, kept)

    def _unlike(self, patches: Tensor, similar: int) -> Tensor:
        return drop_similar(patches, similar, self._permutation(patches.shape[1], patches.device, 0))

    def _at_random(self, index: int, patches: Tensor) -> Tensor:
        n = patches.shape[1]
        chosen = self._permutation(n, patches.device, index)[: self.pruner.config.count(n)].sort().values
        return chosen.expand(len(patches), -1).contiguous()

    def _permutation(self, n: int, device: torch.device, index: int) -> Tensor:
        if self.base.training:
            return torch.randperm(n, device=device)
        generator = torch.Generator().manual_seed(self.pruner.config.seed * 1009 + index)
        return torch.randperm(n, generator=generator).to(device)

    # ---- training

    def _normed(self, hidden: Tensor) -> Tensor:
        norm = self.pruner.norm
        return F.layer_norm(hidden.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps).to(
            hidden.dtype
        )

    def _noisy(self, hidden: Tensor, scores: Tensor) -> Tensor:
        config, share = self.pruner.config, torch.softmax(scores, dim=-1)
        if config.rescaled:
            share = share / share.amax(dim=-1, keepdim=True)
        patches = hidden[:, self.prefix :]
        noise = torch.randn_like(patches, dtype=torch.float32) * (config.noise * (1 - share))[..., None]
        return torch.cat([hidden[:, : self.prefix], patches + noise.to(hidden.dtype)], dim=1)

    def _draw(self, index: int, scores: Tensor) -> None:
        """Draw who is hidden from the next block on; note how far the share is from the one wanted."""
        config = self.pruner.config
        logits = torch.stack([scores, torch.zeros_like(scores)], dim=-1)
        drawn = F.gumbel_softmax(logits, tau=config.tau, hard=True)[..., 0]
        self._shown = drawn if self._shown is None else self._shown * drawn
        wanted = config.keep ** (config.layers.index(index) + 1)
        self._losses.append(config.ratio_weight * (self._shown.mean(dim=1) - wanted).square().mean())

    def _hiding(self) -> Tensor | None:
        """What is added to the attention's logits [B,1,T,T]: hidden patches are seen by themselves alone."""
        if self._shown is None or not isinstance(self.pruner.config, DynamicViTConfig):
            return None
        shown = F.pad(self._shown, (self.prefix, 0), value=1.0)
        bias = torch.log(shown + _HIDDEN)[:, None, None]
        itself = torch.eye(shown.shape[1], dtype=torch.bool, device=shown.device)
        return bias.expand(-1, 1, shown.shape[1], -1).masked_fill(itself, 0.0)

    # ---- patches that pass by

    def _pass_by(self, index: int, hidden: Tensor, kwargs: dict):
        front, x = hidden[:, : self.prefix], hidden[:, self.prefix :].contiguous()
        count, estimator = self.pruner.config.count(x.shape[1]), self.pruner.estimator
        scores = self.pruner.scores(index, x) if estimator is not None else None
        rest: dict = {}

        def block(tokens: Tensor) -> Tensor:
            out = self._run(index, torch.cat([front.to(tokens.dtype), tokens], dim=1), None, kwargs)
            out, rest["out"] = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
            rest["front"] = out[:, : self.prefix]
            return out[:, self.prefix :]

        if self.base.training and estimator is not None:
            update = None
            if estimator.needs_update:
                with torch.no_grad():
                    update = block(x).to(x.dtype) - x
                self.lengths.pop()
            y, kept = estimator.apply(block, x, scores, float(count), count, update)
        else:
            kept = self._at_random(index, x) if scores is None else ops.topk_select(scores, count)[0]
            y = ops.token_scatter(x, kept, block(ops.token_gather(x, kept)).to(x.dtype))
        self.kept[index] = kept
        after = torch.cat([rest["front"].to(y.dtype), y], dim=1)
        return after if rest["out"] is None else (after, *rest["out"])


def _passes_by(config: PatchConfig) -> bool:
    return isinstance(config, ShivaViTConfig) or getattr(config, "pass_by", False)


def blocks(base: nn.Module) -> nn.ModuleList:
    """The blocks of transformers' ViTModel or DeiTModel, of version 4 or 5."""
    return base.layers if hasattr(base, "layers") else base.encoder.layer


def find_vit(model: nn.Module) -> tuple[nn.Module, int] | None:
    """The ViTModel or DeiTModel in a model, and the tokens in front of its patches; None if there is none."""
    for module in model.modules():
        if type(module).__name__ in PREFIX:
            return module, PREFIX[type(module).__name__]
    return None


def enable_patches(model: nn.Module, source: PatchPruner | PatchConfig) -> ViTHandle:
    """See :func:`shiva_ext.enable`."""
    if isinstance(source, PatchConfig) and source.scored():
        raise TypeError(
            f"shiva_ext: {type(source).__name__} has heads that are learned, got its settings alone; train a "
            "shiva_ext.vit.PatchPruner(config, width) with the model, and enable that"
        )
    found = find_vit(model)
    if found is None:
        raise TypeError(
            f"shiva_ext: {type(model).__name__} holds no ViTModel or DeiTModel of transformers, which a "
            "PatchPruner is for"
        )
    base, prefix = found
    pruner = PatchPruner(source, base.config.hidden_size) if isinstance(source, PatchConfig) else source
    depth, width = len(blocks(base)), base.config.hidden_size
    if width != pruner.width:
        raise ValueError(f"shiva_ext: the pruner is for {pruner.width} channels, the model has {width}")
    last = max((*pruner.config.layers, *pruner.config.scored()))
    if last > depth - 2:
        raise ValueError(
            f"shiva_ext: block {last} has a head or loses patches; the model has blocks 0 to {depth - 1}, and one must "
            "come after it: change layers (or TNTConfig.sites)"
        )
    if (old := get_patches(model)) is not None:
        old.disable()
    handle = ViTHandle(model, pruner, base, prefix)
    handle._attach()
    setattr(model, _HANDLE, handle)
    return handle


def get_patches(model: nn.Module) -> ViTHandle | None:
    """The handle of an enabled model."""
    return getattr(model, _HANDLE, None)
