"""Token selection around a model's own blocks, through diffusers' hook registry. No forward is rewritten."""

import functools
import math
from collections.abc import Callable
from typing import Protocol

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from . import ops
from .models import Conditioning, ModelAdapter

HOOK_NAME = "shiva_ext"
_DENSE = 1 << 24  # ratios as integers: torch.compile keeps these exact and static


class Selector(Protocol):
    """Anything that can choose tokens: a trained artefact, or a baseline."""

    def ratios(self, sigma: float) -> tuple[float, ...]:
        """Share of tokens that each layer keeps at noise level sigma, 1 for a dense layer."""

    def scores(self, layer: int, x: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        """Scores [B,N] of the tokens x [B,N,D] at the entry of a layer."""


class SelectionState:
    """What the hooks of one transformer share. It is set anew for every call: nothing is carried between steps.

    Attributes:
        tile: token counts are rounded to multiples of it.
        batched_guidance: whether the batch is (unconditional, conditional), which then keep the same tokens.
        sigma: noise level of the coming call if a scheduler or :meth:`at` announced it, else None.
        active: False makes every hook a plain call of the model (the dense teacher's run).
        trainer: takes over a pruned block while training, see ``training/stages.py``.
        records: per call while recording, ``{"timestep", "num_tokens", "kept": {layer: [B,k]}}``.
    """

    def __init__(self, selector: Selector, adapter: ModelAdapter, tile: int = 1, batched_guidance: bool = False):
        self.selector, self.adapter = selector, adapter
        self.tile, self.batched_guidance = tile, batched_guidance
        self.active, self.trainer = True, None
        self.sigma: float | None = None
        self.recording, self.records = False, []
        self.quota: tuple[int, ...] = ()
        self.conditioning: Conditioning | None = None
        self.guided = False

    def at(self, sigma: float) -> None:
        """Announce the noise level of the coming calls, as a Python number that torch.compile can rely on."""
        if not 0 <= sigma <= 1:
            raise ValueError(f"shiva_ext: sigma is {sigma}, wanted a noise level in [0, 1] (timestep / 1000)")
        self.sigma = float(sigma)
        self.quota = tuple(
            _DENSE if ratio >= 1 else math.floor(ratio * _DENSE) + 1 for ratio in self.selector.ratios(self.sigma)
        )

    def read_sigma(self, timestep: Tensor) -> None:
        """Take the noise level from a call's timesteps [B], where nobody announced it."""
        values = timestep.detach().flatten().float() / 1000
        if values.numel() == 0:
            raise ValueError("shiva_ext: timestep is empty, wanted one noise level per sample")
        low, high = values.min().item(), values.max().item()
        if high - low > 1e-4:
            raise ValueError(
                f"shiva_ext: the samples of one call have noise levels from {low:.4f} to {high:.4f}, but they share one "
                "token count per layer; call the model once per level, or fix it with handle.at(sigma)"
            )
        self.at(min(max(low, 0.0), 1.0))

    def tokens(self, layer: int, N: int) -> int:
        """How many of N tokens a layer keeps: floor(N * ratio), to the nearest multiple of the tile, never 0."""
        quota = self.quota[layer]
        if quota >= _DENSE:
            return N
        k = (N * quota) >> 24
        if self.tile > 1:
            lower = k // self.tile * self.tile
            upper = min(lower + self.tile, N)
            k = lower if lower and k - lower < upper - k else upper
        return max(k, 1)

    def select(self, layer: int, x: Tensor, k: int) -> Tensor:
        """Indices [B,k] of the tokens of x [B,N,D] that a layer keeps, ascending."""
        scores = self.selector.scores(layer, x, self.sigma, self.conditioning)
        if self.guided:
            # Shiva-DiT (arXiv 2602.05605), eq. 32: both halves keep what either of them needs most.
            if x.shape[0] % 2:
                raise ValueError(
                    f"shiva_ext: batched guidance is on, but the batch has {x.shape[0]} samples, wanted an even number; "
                    "enable with batched_guidance=False for a model called without guidance"
                )
            unified = torch.maximum(*scores.chunk(2))
            kept = ops.topk_select(unified.detach(), k)[0].repeat(2, 1)
        else:
            kept = ops.topk_select(scores.detach(), k)[0]
        if self.recording:
            self.records[-1]["kept"][layer] = kept.detach().cpu()
        return kept


class TransformerHook(ModelHook):
    """On the whole transformer: reads the step's noise level and conditioning before the blocks run."""

    def __init__(self, state: SelectionState):
        super().__init__()
        self.state = state

    def new_forward(self, module: nn.Module, *args, **kwargs):
        state, forward = self.state, self.fn_ref.original_forward
        if not state.active:
            return forward(*args, **kwargs)
        arguments = state.adapter.bind(forward, args, kwargs)
        state.conditioning = state.adapter.conditioning(module, arguments)
        state.guided = state.adapter.batched_guidance(arguments, state.batched_guidance)
        announced = state.sigma is not None
        if not announced:
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    "shiva_ext: a compiled transformer needs its noise level as a Python number; enable on the "
                    "pipeline, or call handle.at(sigma) before each step"
                )
            state.read_sigma(state.conditioning.timestep)
        if state.recording:
            state.records.append({"timestep": state.sigma * 1000, "kept": {}})
        try:
            return forward(*args, **kwargs)
        finally:
            if not announced:
                state.sigma = None
            if not torch.is_grad_enabled():  # with gradients, checkpointed blocks run again in the backward
                state.conditioning = None


class BlockHook(ModelHook):
    """On one block: gather the kept tokens, run the block itself on them, put them back among the others."""

    def __init__(self, state: SelectionState, layer: int):
        super().__init__()
        self.state, self.layer = state, layer

    def new_forward(self, module: nn.Module, *args, **kwargs):
        state, forward = self.state, self.fn_ref.original_forward
        if not state.active:
            return forward(*args, **kwargs)
        name = state.adapter.image_argument
        positional = name not in kwargs
        x = args[0] if positional else kwargs[name]

        def run(tokens: Tensor):
            return forward(tokens, *args[1:], **kwargs) if positional else forward(*args, **{**kwargs, name: tokens})

        if state.trainer is not None:
            return state.trainer.run_block(self.layer, x, run)
        N = x.shape[1]
        k = state.tokens(self.layer, N)
        if k == N:
            return run(x)
        kept = state.select(self.layer, x, k)
        output = run(ops.token_gather(x, kept))
        processed = state.adapter.image_tokens(output).to(x.dtype)
        return state.adapter.with_image_tokens(output, ops.token_scatter(x, kept, processed))


def attach(transformer: nn.Module, state: SelectionState) -> int:
    """Hook the transformer and each of its blocks from the first pruned one on; returns the number of blocks."""
    blocks = state.adapter.blocks(transformer)
    first_layer = getattr(state.selector, "first_layer", 1)
    if len(blocks) <= first_layer:
        raise RuntimeError(
            f"shiva_ext: no block was hooked: {type(transformer).__name__} has {len(blocks)} blocks and the first "
            f"{first_layer} stay dense"
        )
    for layer, block in enumerate(blocks):
        if layer >= first_layer:
            HookRegistry.check_if_exists_or_initialize(block).register_hook(BlockHook(state, layer), HOOK_NAME)
    HookRegistry.check_if_exists_or_initialize(transformer).register_hook(TransformerHook(state), HOOK_NAME)
    return len(blocks) - first_layer


def detach(transformer: nn.Module) -> None:
    """Remove this package's hooks, and every registry that only they had needed."""
    for module in transformer.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is None:
            continue
        registry.remove_hook(HOOK_NAME, recurse=False)
        if not registry.hooks:
            del module._diffusers_hook
            # remove_hook leaves the bound forward as an attribute; the class's own is the same function.
            if "forward" in vars(module) and getattr(module.forward, "__func__", None) is type(module).forward:
                del module.forward


class SchedulerWatch:
    """Announces each step's noise level from a pipeline's scheduler, before the transformer is called.

    The level must be a Python number before a compiled transformer runs, so it cannot be read from the timestep tensor.
    """

    METHODS = ("set_timesteps", "set_begin_index", "step")

    def __init__(self, pipeline, state: SelectionState, batched_guidance: bool | None = None):
        self.pipeline, self.state, self.scheduler = pipeline, state, pipeline.scheduler
        self.batched_guidance = batched_guidance
        self.levels: list[float] = []
        for name in self.METHODS:
            if hasattr(self.scheduler, name):
                setattr(self.scheduler, name, self._wrapped(name))

    def _wrapped(self, name: str) -> Callable:
        original = getattr(self.scheduler, name)

        @functools.wraps(original)
        def call(*args, **kwargs):
            result = original(*args, **kwargs)
            self._announce(reread=name == "set_timesteps")
            return result

        return call

    def _announce(self, reread: bool) -> None:
        scheduler = self.scheduler
        if reread:
            self.levels = [min(max(t / 1000, 0.0), 1.0) for t in scheduler.timesteps.tolist()]
            if self.batched_guidance is None:
                self.state.batched_guidance = bool(getattr(self.pipeline, "do_classifier_free_guidance", False))
        index = getattr(scheduler, "step_index", None)
        if index is None:
            index = getattr(scheduler, "begin_index", None) or 0
        if index < len(self.levels):
            self.state.at(self.levels[index])
        else:
            self.state.sigma = None  # the last step is done

    def remove(self) -> None:
        for name in self.METHODS:
            if name in vars(self.scheduler):
                delattr(self.scheduler, name)
