"""Where in a run of the sampler a cached transformer is, and what it carries from step to step."""

from collections.abc import Callable

import torch
from diffusers.hooks.hooks import BaseState, StateManager
from torch import Tensor

from ..models import ModelAdapter

MOST_CALLS = 16  # of one step; more than any guidance makes


class CacheState:
    """What the cache hooks of one transformer share.

    A step is told by a pipeline's scheduler. Without one it is read from the calls: a lower noise level is the next
    step, a higher one a new run, and the same one another call of the step (guidance in two calls).

    Attributes:
        step: of the run, counted from 0; None while no run is known.
        steps: of the whole run.
        level: of the step's noise, in whatever unit it is told in: it falls along a run.
        guided: whether this call's batch is (unconditional, conditional).
        peak_bytes: the most that was stored at the end of a call.
        bypass: this call is no part of the run (skip-layer guidance leaves out layers, or the step was broken off): it
            is computed and not stored.
        broken: a call of this step has failed, so that it is not known whose calls come next.
        key: what tells the calls of a step apart: guidance's branch, and the latents' shape, dtype and device. Values
            are stored and found under it, so that nothing of one branch or size is used in another.
        computed, reused: calls of this run that computed everything, and others; TeaCache counts those of each image.
        stores: dicts in which hooks keep tensors, by ``key``; emptied with every run.
        on_reset, kept_elsewhere, undo: of a cache whose hooks keep tensors elsewhere: called as a run ends, for their
            bytes, and to take the hooks off.
        branches: of diffusers' hooks: what they keep for each branch of guidance.
        announced: whether a scheduler has told the step.
        context: diffusers' pipelines name their calls here ("cond", "uncond").
        planned: what :meth:`Cache.begin_step` said of the step.
        selection: state of the token selection that is enabled beside the cache, or None.
    """

    def __init__(self, cache, adapter: ModelAdapter, batched_guidance: bool = False):
        self.cache, self.adapter, self.batched_guidance = cache, adapter, batched_guidance
        self.watch, self.selection, self.scheduler = None, None, None
        self.context = StateManager(BaseState)
        self.stores: list[dict] = []
        self.on_reset: list[Callable[[], None]] = []
        self.kept_elsewhere: list[Callable[[], int]] = []
        self.undo: list[Callable[[], None]] = []
        self.branches = None
        self.guided = self.bypass = self.broken = False
        self.peak_bytes = 0
        self.key: tuple = ()
        self.last: tuple[int, int] | None = None  # computed and reused of the run before
        self.forget()

    def new_run(self) -> None:
        """Forget everything that a run has stored."""
        if getattr(self, "computed", 0) + getattr(self, "reused", 0):
            self.last = self.computed, self.reused
        self.computed = self.reused = 0
        for store in self.stores:
            store.clear()
        for reset in self.on_reset:
            reset()

    def forget(self) -> None:
        """No run is known any more."""
        self.new_run()
        self.step, self.steps, self.level, self.calls = None, None, None, 0
        self.planned, self.announced = (), False

    def check_guidance(self, guides: bool) -> None:
        """A cache is for models with and without guidance."""

    def at(self, sigma: float) -> None:
        """The scheduler's next step has this noise level; where it is in the run is read from its watch."""
        if self.watch.scheduler is not self.scheduler:
            self.cache.check_scheduler(self.watch.scheduler)
            self.scheduler = self.watch.scheduler
        self._place(self.watch.index, len(self.watch.levels), sigma)
        self.announced = True

    def _place(self, step: int, steps: int, level: float) -> None:
        self.planned = self.cache.begin_step(step, steps)
        if self.step is not None and (step < self.step or steps != self.steps):
            self.new_run()
        self.step, self.steps, self.level, self.calls, self.broken = step, steps, level, 0, False

    def begin(self, arguments: dict) -> None:
        """A call of the transformer with these named arguments begins."""
        x = arguments["hidden_states"]
        self.bypass = bool(arguments.get("skip_layers"))
        self.guided = self.adapter.batched_guidance(arguments, self.batched_guidance)
        if self.bypass:
            return
        if not self.announced:
            self._read_step(arguments["timestep"])
        self.bypass = self.broken
        if self.bypass:
            return
        context = self.context._context
        if context is None and self.calls == MOST_CALLS:
            raise RuntimeError(
                f"shiva_ext: {self.cache.name} got more than {MOST_CALLS} calls of one step, at noise level "
                f"{self.level:g}, and keeps something for each; call handle.reset() between runs of the same levels"
            )
        call = self.calls if context is None else context.name
        self.calls += 1
        self.key = (call, tuple(x.shape), x.dtype, x.device)

    def _read_step(self, timestep: Tensor) -> None:
        name = self.cache.name
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"shiva_ext: {name} in a compiled transformer is told its step by a pipeline's scheduler; enable it on "
                "the pipeline"
            )
        steps = self.cache.steps
        if steps is None:
            raise RuntimeError(
                f"shiva_ext: {name} has to know its place in the run; enable it on the pipeline whose scheduler runs, "
                f"or say how many steps a run has: {name}(..., steps=N)"
            )
        level = float(timestep.detach().max())  # waits for the GPU
        if self.step is None or level > self.level:
            self.new_run()
            self._place(0, steps, level)
        elif level < self.level:
            if self.step + 1 >= steps:
                raise RuntimeError(
                    f"shiva_ext: {name} was enabled for runs of {steps} steps, got one more (timestep {level:g} after "
                    f"{self.level:g}); give the number of steps that are made, or call handle.reset() between runs"
                )
            self._place(self.step + 1, steps, level)

    @property
    def bytes(self) -> int:
        """Memory that the stored tensors take."""
        return bytes_of(self.stores) + sum(count() for count in self.kept_elsewhere)

    @property
    def timestep(self) -> float:
        """Of the step, in 0 to 1000, for caches that ask.

        Raises:
            RuntimeError: no scheduler tells.
        """
        if not self.announced:
            raise RuntimeError(
                f"shiva_ext: {self.cache.name} asks for timesteps; enable it on the pipeline whose scheduler has them"
            )
        return self.level * 1000


def bytes_of(value) -> int:
    """Memory that the tensors in nested dicts, lists and tuples take."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return 0
    return sum(map(bytes_of, value))
