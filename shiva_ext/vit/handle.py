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
        lengths: tokens that each block of the last call worked on, class token included.
    """

    def __init__(self, model: nn.Module, pruner: PatchPruner, base: nn.Module, prefix: int):
        self.model, self.pruner, self.base, self.prefix = model, pruner, base, prefix
        self.lengths: list[int] = []
        self._gone: dict[int, Tensor] = {}  # by block, who stays [B,k] among those that are left; -1 before the first
        self._chosen: dict[int, Tensor] = {}  # by block, who does not pass by
        self._shown: Tensor | None = None  # [B,n] in {0,1}, DynamicViT's, straight through
        self._losses: list[Tensor] = []
        self._before: list[tuple[nn.Module, object]] = []

    def disable(self) -> None:
        """Give the model all of its patches again. Harmless if done before."""
        while self._before:
            layer, forward = self._before.pop()
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.forward = forward
        if getattr(self.base, _HANDLE, None) is self:
            delattr(self.base, _HANDLE)

    def __enter__(self) -> "ViTHandle":
        return self

    def __exit__(self, *error) -> None:
        self.disable()

    def __getstate__(self) -> dict:
        """What a copy gets: nothing of a call, whose tensors belong to its graph."""
        return self.__dict__ | dict(_losses=[], _shown=None, _gone={}, _chosen={}, lengths=[])

    @property
    def kept(self) -> dict[int, Tensor]:
        """Of the last call, by block, the patches [B,k] int64, ascending, that stayed after one that drops some (-1:
        before the first), or that one worked on that others pass by."""
        found, place = dict(self._chosen), None
        for index, stays in self._gone.items():
            place = stays if place is None else place.gather(1, stays)
            found[index] = place
        return found

    def loss(self) -> Tensor:
        """What the last call in training mode asks to be minimised beside the task's loss; 0 where it asks nothing."""
        return torch.stack(self._losses).sum() if self._losses else torch.zeros(())

    def _attach(self) -> None:
        # Partials of bound methods alone: a deepcopy of the model then has those of its own handle.
        for layer in self.base.layers:
            index = len(self._before)
            self._before.append((layer, layer.__dict__.get("forward")))
            layer.forward = partial(self._forward, index)

    # ---- a block

    def _run(self, index: int, hidden: Tensor, mask: Tensor | None, kwargs: dict) -> Tensor:
        layer, forward = self._before[index]
        self.lengths.append(hidden.shape[1])
        own = partial(type(layer).forward, layer) if forward is None else forward
        return own(hidden, attention_mask=mask, **kwargs)

    def _forward(self, index: int, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        if attention_mask is not None:
            raise ValueError("shiva_ext: an attention mask cannot be given to a model whose patches are pruned")
        config, hidden = self.pruner.config, hidden_states
        if self.pruner.device not in (None, hidden.device):
            raise ValueError(
                f"shiva_ext: the pruner is on {self.pruner.device}, the tokens on {hidden.device}; move it with "
                "handle.pruner.to(...)"
            )
        if hidden.shape[-1] != self.pruner.width:
            raise ValueError(f"shiva_ext: the pruner is for {self.pruner.width} channels, got {hidden.shape[-1]}")
        if index == 0:
            self._gone, self._chosen, self.lengths, self._shown = {}, {}, [], None
            if self.base.training:
                self._losses = []
            if isinstance(config, TNTConfig) and config.similar and len(config.layers) > 1 and not self.base.training:
                hidden = self._stay(-1, hidden, self._unlike(hidden[:, self.prefix :], config.similar))
        if _passes_by(config) and index in config.layers:
            return self._pass_by(index, hidden, kwargs)
        out = self._run(index, hidden, self._hiding(hidden.dtype), kwargs)
        if index == len(self._before) - 1:
            self._shown = None  # which holds on to the graph
        return self._after(index, out)

    def _after(self, index: int, out: Tensor) -> Tensor:
        config, training = self.pruner.config, self.base.training
        if isinstance(config, TNTConfig) and index < config.sites:
            scored = training or index in config.layers
            # Of the block's output, before the norm.
            scores = self.pruner.scores(index, out[:, self.prefix :]) if scored else None
            if training:
                return self._noisy(self._normed(out), scores)
            if config.norm_in_eval:
                out = self._normed(out)
            return self._keep_best(index, out, scores) if scored else out
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
        self._gone[index] = kept
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
        # Hashed: a generator would break a compiled graph, and on a GPU wait for the host.
        x = torch.arange(n, device=device) + (self.pruner.config.seed * 1009 + index) * 0x9E3779B9 % 2**31
        for _ in range(3):
            x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
        return x.argsort(stable=True)

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
        config, layer = self.pruner.config, self._before[index][0]
        kind = getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", {})
        if getattr(layer, "gradient_checkpointing", False) and kind.get("use_reentrant", True):
            raise RuntimeError(
                "shiva_ext: reentrant checkpoints lose the gradient of DynamicViT's draws; call "
                "model.gradient_checkpointing_enable({'use_reentrant': False})"
            )
        logits = torch.stack([scores, torch.zeros_like(scores)], dim=-1)
        drawn = F.gumbel_softmax(logits, tau=config.tau, hard=True)[..., 0]
        self._shown = drawn if self._shown is None else self._shown * drawn
        wanted = config.keep ** (config.layers.index(index) + 1)
        self._losses.append(config.ratio_weight * (self._shown.mean(dim=1) - wanted).square().mean())

    def _hiding(self, dtype: torch.dtype) -> Tensor | None:
        """What is added to the attention's logits [B,1,T,T]: hidden patches are seen by themselves alone."""
        if self._shown is None or not isinstance(self.pruner.config, DynamicViTConfig):
            return None
        shown = F.pad(self._shown, (self.prefix, 0), value=1.0)
        bias = torch.log(shown + _HIDDEN)[:, None, None]
        itself = torch.eye(shown.shape[1], dtype=torch.bool, device=shown.device)
        return bias.expand(-1, 1, shown.shape[1], -1).masked_fill(itself, 0.0).to(dtype)

    # ---- patches that pass by

    def _pass_by(self, index: int, hidden: Tensor, kwargs: dict) -> Tensor:
        front, x = hidden[:, : self.prefix], hidden[:, self.prefix :].contiguous()
        count, estimator = self.pruner.config.count(x.shape[1]), self.pruner.estimator
        scores = self.pruner.scores(index, x) if estimator is not None else None
        rest: dict = {}

        def block(tokens: Tensor) -> Tensor:
            out = self._run(index, torch.cat([front.to(tokens.dtype), tokens], dim=1), None, kwargs)
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
        self._chosen[index] = kept
        return torch.cat([rest["front"].to(y.dtype), y], dim=1)


def _passes_by(config: PatchConfig) -> bool:
    return isinstance(config, ShivaViTConfig) or getattr(config, "pass_by", False)


def find_vit(model: nn.Module) -> tuple[nn.Module, int] | None:
    """The ViTModel or DeiTModel in a model, and the tokens in front of its patches; None if there is none.

    Raises:
        ValueError: there are several.
    """
    found = []
    for name, module in model.named_modules():
        kinds = [cls.__name__ for cls in type(module).__mro__ if cls.__name__ in PREFIX]
        if kinds:
            found.append((name, module, PREFIX[kinds[0]]))
    if len(found) > 1:
        names = ", ".join(name for name, *_ in found)
        raise ValueError(f"shiva_ext: the model holds {len(found)} vision transformers, {names}: enable one of them")
    return found[0][1:] if found else None


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
    if type(model).__name__.endswith("MaskedImageModeling") and not _passes_by(pruner.config):
        raise TypeError(
            f"shiva_ext: {type(model).__name__} makes a picture of all patches; give settings by which they pass by "
            "(ShivaViTConfig, RandomPatchConfig(pass_by=True))"
        )
    depth, width = len(base.layers), base.config.hidden_size
    if width != pruner.width:
        raise ValueError(f"shiva_ext: the pruner is for {pruner.width} channels, the model has {width}")
    last = max((*pruner.config.layers, *pruner.config.scored()))
    if last > depth - 2:
        raise ValueError(
            f"shiva_ext: block {last} has a head or loses patches; the model has blocks 0 to {depth - 1}, and one must "
            "come after it: change layers (or TNTConfig.sites)"
        )
    if (old := get_patches(base)) is not None:
        old.disable()
    device = next(base.parameters()).device
    if device.type != "meta":
        pruner.to(device)
    handle = ViTHandle(model, pruner, base, prefix)
    handle._attach()
    setattr(base, _HANDLE, handle)
    return handle


def get_patches(model: nn.Module) -> ViTHandle | None:
    """The handle of an enabled model, or of a model in which one is enabled."""
    return next((found for module in model.modules() if (found := getattr(module, _HANDLE, None))), None)
