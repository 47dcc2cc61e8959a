"""Token selection around a model's own blocks, through diffusers' hook registry. No forward is rewritten."""

from collections.abc import Callable
from dataclasses import fields

import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.group_offloading import GroupOffloadingHook
from torch import Tensor, nn

from . import ops
from .methods.base import ATTENTION, BLOCK, BlockCall
from .models.fused import find_form, why_not
from .reconstruct import IDENTITY, LAST, reconstruct
from .selection_state import SelectionState, odd_batch

HOOK_NAME = "shiva_ext"


class TransformerHook(ModelHook):
    """On the whole transformer: reads the step's noise level and conditioning before the blocks run."""

    def __init__(self, state: SelectionState):
        super().__init__()
        self.state = state

    def new_forward(self, module: nn.Module, *args, **kwargs):
        state, forward = self.state, self.fn_ref.original_forward
        if not state.active:
            with state.kept_for_checkpoints(module):
                return forward(*args, **kwargs)
        compiling = torch.compiler.is_compiling()
        if state.watch is not None and not compiling:
            state.watch.refresh()
        args, kwargs = with_weights(module, args, kwargs)
        arguments = state.adapter.bind(forward, args, kwargs)
        state.conditioning = state.adapter.conditioning(module, arguments)
        state.guided = state.branch is None and state.adapter.batched_guidance(arguments, state.batched_guidance)
        state.chosen, state.scratch = {}, {}
        state.skipped = tuple(arguments.get("skip_layers") or ())
        state.grid = state.adapter.grid(module, arguments) if state.wants_grid else None
        try:
            if not compiling:
                return self._run(module, *args, **kwargs)
            if not state.quota and state.trainer is None:  # a look at sigma would make a graph for each level
                raise RuntimeError(
                    "shiva_ext: a compiled transformer needs its noise level as a Python number; enable on the "
                    "pipeline, or call handle.at(sigma) before each step"
                )
            return self._forward(*args, **kwargs)
        finally:
            state.conditioning, state.chosen = None, {}
            if state.trainer is None:  # a training call is looked at afterwards
                state.scratch = {}

    def _forward(self, *args, **kwargs):
        """The transformer's own forward, in its place in the run for those that have a memory of it."""
        state, forward = self.state, self.fn_ref.original_forward
        if state.method is None and state.reconstruct != LAST:
            return forward(*args, **kwargs)
        if torch.compiler.is_compiling() and state.stateful is not None:
            raise RuntimeError(
                f"shiva_ext: {state.stateful} carries tensors from one step to the next, which a compiled transformer "
                "cannot; run it without torch.compile"
            )
        x = state.adapter.bind(forward, args, kwargs)["hidden_states"]
        if state.guided and len(x) % 2:
            raise ValueError(f"shiva_ext: {odd_batch(len(x))}")
        # One batch has both halves of guidance: what comes again at a level of a pipeline is its solver's.
        state.memory.begin(state.sigma, x, repeated=state.guided and state.watch is not None)
        output = forward(*args, **kwargs)
        # A call without guidance in a guided run is skip-layer guidance's.
        if state.method is not None and state.guided == state.batched_guidance:
            # Models that learn a variance, too, give it in further channels.
            state.method.finish(output[0][:, : x.shape[1]], state.guided, state.grid, state.memory)
        return output

    def _run(self, module: nn.Module, *args, **kwargs):
        """Eager code can look at the call itself: its timesteps count, whatever was announced for another call."""
        state = self.state
        announced = state.sigma, state.quota
        timestep = state.conditioning.timestep
        known = state.fixed or (state.watch is not None and state.watch.announced(timestep))
        if state.trainer is None and not known:
            state.read_sigma(timestep)  # waits for the GPU
        state.wrapped = {}
        if state.recording:
            state.entry = {"timestep": state.sigma * 1000, "kept": {}, "sites": {}}
            if state.branch is not None:
                state.entry["rows"] = torch.arange(state.branch.start, state.branch.stop)
            state.records.append(state.entry)
        try:
            with state.kept_for_checkpoints(module):
                return self._forward(*args, **kwargs)
        finally:
            state.sigma, state.quota = announced
            state.entry = None


class BlockHook(ModelHook):
    """On one block: gather the kept tokens, run the block itself on them, put them back among the others.

    The fused form of a block, where it has one, does the gathering and putting back on the way.
    """

    def __init__(self, state: SelectionState, layer: int, block: nn.Module):
        super().__init__()
        self.state, self.layer = state, layer
        self.form = find_form(block)
        self.adaptive = (
            None if isinstance(self.form, str) else type(getattr(block, self.form.adaptive_norm or "", None))
        )

    def why_wrapped(self, module: nn.Module, arguments: dict) -> str | None:
        """Why a call with these named arguments does not run fused; None if it does."""
        if not self.state.fused:
            return "fused=False"
        if self.state.method is not None:
            return f"{type(self.state.method).__name__} merges its tokens"
        if self.state.reconstruct != IDENTITY:
            return f"reconstruct={self.state.reconstruct!r}"
        if isinstance(self.form, str):
            return self.form
        if type(getattr(module, self.form.adaptive_norm or "", None)) is not self.adaptive:
            return f"{self.form.adaptive_norm} was replaced"
        return why_not(module, self.form, self.fn_ref.original_forward, arguments)

    def new_forward(self, module: nn.Module, *args, **kwargs):
        state, forward = self.state, self.fn_ref.original_forward
        name = state.adapter.image_argument
        x = kwargs[name] if name in kwargs else args[0]
        if not state.active:
            output = forward(*args, **kwargs)
            if state.captured is not None:
                state.captured[self.layer] = (x, state.adapter.image_tokens(output))
            return output

        def run(tokens: Tensor, kept: Tensor | None = None):
            with state.running(kept, x.shape[1]):
                return state.adapter.call(forward, tokens, args, kwargs, kept)

        if state.trainer is not None:
            return state.trainer.run_block(self.layer, x, run)
        if state.method is not None:
            return state.method.run_block(block_call(state, self.layer, type(module).__name__, x, run))
        N = x.shape[1]
        k = state.tokens(self.layer, N)
        if k == N:
            return run(x)
        kept = state.select(self.layer, x, k)
        arguments = state.adapter.bind(forward, args, kwargs)
        reason = self.why_wrapped(module, arguments)
        if reason is None:
            with state.running(kept, N):
                return state.adapter.call_fused(self.form, module, x, kept, arguments)
        if not torch.compiler.is_compiling():
            state.wrapped[self.layer] = reason
        output = run(ops.token_gather(x, kept), kept)
        processed = state.adapter.image_tokens(output).to(x.dtype)
        if state.reconstruct != IDENTITY:
            tokens = reconstruct(state.reconstruct, x, kept, processed, state.grid, state.memory, self.layer)
        else:
            tokens = ops.token_scatter(x, kept, processed)
        return state.adapter.with_image_tokens(output, tokens)


def block_call(
    state: SelectionState, layer: int, kind: str, x: Tensor, run: Callable, training: bool = False
) -> BlockCall:
    """What a method gets to know of a call of a block, see :class:`~shiva_ext.methods.base.BlockCall`."""

    def record(leaders: Tensor, sites: tuple[str, ...]) -> None:
        if state.entry is not None:
            state.entry["kept"][layer] = leaders.detach().cpu()
            state.entry["sites"][layer] = sites

    weights = getattr(state.selector, "weights", None)
    first = None if weights is None else next(weights.parameters(), None)
    if first is not None and first.device != x.device:
        weights.to(x.device)  # the model was moved, or is offloaded between calls
    return BlockCall(
        layer=layer,
        kind=kind,
        x=x,
        sigma=state.sigma,
        progress=state.progress,
        grid=state.grid,
        guided=state.guided,
        memory=state.memory,
        run=run,
        plan=state.plan,
        tokens_of=state.adapter.image_tokens,
        replaced=state.adapter.with_image_tokens,
        record=record,
        conditioning=state.conditioning,
        weights=weights,
        scratch=state.scratch,
        skipped=state.skipped,
        training=training,
    )


class SiteHook(ModelHook):
    """On a module inside a block: runs it as the block's method planned, on merged tokens or in another way."""

    def __init__(self, state: SelectionState, site: str, index: int):
        super().__init__()
        self.state, self.site, self.index = state, site, index

    def new_forward(self, module: nn.Module, *args, **kwargs):
        forward, merge = self.fn_ref.original_forward, self.state.plan.get(self.site)
        if merge is None:
            return forward(*args, **kwargs)
        if callable(merge):
            return self._replaced(merge, module, forward, *args, **kwargs)
        merge = merge.of_module(self.index) if hasattr(merge, "of_module") else merge
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if x.shape[1] != self.state.grid[0] * self.state.grid[1]:
            raise ValueError(
                f"shiva_ext: the {self.site} of a block was called with {x.shape[1]} tokens, wanted all "
                f"{self.state.grid[0]} x {self.state.grid[1]}; turn forward chunking off, or give sites=('block',)"
            )
        if "hidden_states" in kwargs:
            output = forward(*args, **{**kwargs, "hidden_states": merge.merge(x)})
        else:
            output = forward(merge.merge(x), *args[1:], **kwargs)
        if isinstance(output, tuple):
            return merge.unmerge(output[0]), *output[1:]
        return merge.unmerge(output)

    def _replaced(self, replacement: Callable, module: nn.Module, forward: Callable, *args, **kwargs):
        if self.site != ATTENTION:
            return replacement(module, forward, *args, **kwargs)
        x, text = kwargs.pop("hidden_states", None), kwargs.pop("encoder_hidden_states", None)
        x = args[0] if x is None else x
        unknown = [name for name, value in kwargs.items() if value is not None]
        if unknown:
            raise TypeError(
                f"shiva_ext: {type(self.state.method).__name__} runs attention itself and knows no {unknown[0]!r}; "
                "call the model without it"
            )
        return replacement(module, forward, x, text)


def with_weights(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Bring an offloaded module's weights before their hooks' turn, which may come after ours; a call's arguments."""
    for hook in (getattr(module, "_hf_hook", None), *module._diffusers_hook.hooks.values()):
        if isinstance(hook, (AlignDevicesHook, CpuOffload, GroupOffloadingHook)):
            args, kwargs = hook.pre_forward(module, *args, **kwargs)
    return args, kwargs


def install(module: nn.Module, hook: ModelHook, name: str = HOOK_NAME) -> None:
    """Put a hook around all that a module has."""
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)
    hook.installed = module.forward


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
            install(block, BlockHook(state, layer, block))
            for module, hook in [*state.adapter.inner_hooks(block), *_site_hooks(block, state)]:
                install(module, hook)
    install(transformer, TransformerHook(state))
    return len(blocks) - first_layer


def _site_hooks(block: nn.Module, state: SelectionState) -> list[tuple[nn.Module, ModelHook]]:
    """Hooks for the modules of a block that the method merges around."""
    wanted = () if state.method is None else [site for site in state.method.sites if site != BLOCK]
    sites = state.adapter.merge_sites(block) if wanted else {}
    missing = [site for site in wanted if site not in sites]
    if missing:
        choosable = any(each.name == "sites" for each in fields(state.method))
        advice = "give sites=('block',)" if choosable else "use another method"
        raise ValueError(
            f"shiva_ext: {type(state.method).__name__} merges around {' and '.join(missing)}, which needs modules that "
            f"take image tokens alone, and {type(block).__name__} has none; {advice}"
        )
    return [(module, SiteHook(state, site, i)) for site in wanted for i, module in enumerate(sites[site])]


def wrapped_blocks(transformer: nn.Module, state: SelectionState) -> dict[int, str]:
    """Why hooked blocks do not run in their fused form, by layer: in general, or in the last call."""
    found = {}
    for layer, block in enumerate(state.adapter.blocks(transformer)):
        registry = getattr(block, "_diffusers_hook", None)
        hook = None if registry is None else registry.get_hook(HOOK_NAME)
        reason = None if hook is None else hook.why_wrapped(block, {}) or state.wrapped.get(layer)
        if reason is not None:
            found[layer] = reason
    return found


def detach(transformer: nn.Module, name: str = HOOK_NAME) -> None:
    """Remove all hooks of a name, by default the selection's, and every registry that only they had needed."""
    for module in transformer.modules():
        remove(module, name)


def remove(module: nn.Module, name: str) -> None:
    """Remove a hook of a module, if it has one of this name. It must be the last one that was put on it."""
    registry = getattr(module, "_diffusers_hook", None)
    if registry is None:
        return
    hook, outer = registry.get_hook(name), vars(module).get("forward")
    registry.remove_hook(name, recurse=False)
    if hook is not None and vars(module).get("_old_forward", 0) is getattr(hook, "installed", None):
        # An accelerate hook, such as CPU offload, was put around ours: it stays, around what was there before.
        module._old_forward, module.forward = module.forward, outer
    if not registry.hooks:
        del module._diffusers_hook
        # remove_hook leaves the bound forward as an attribute; the class's own is the same function.
        if "forward" in vars(module) and getattr(module.forward, "__func__", None) is type(module).forward:
            del module.forward
