"""Announces each step's noise level from a pipeline's scheduler, before the transformer is called."""

import copy
import functools
import warnings
from typing import Protocol

from torch import Tensor

from .models import ModelAdapter


def _version(t: Tensor) -> int | None:
    return None if t.is_inference() else t._version


class _Announcing:
    """A scheduler's method that announces the coming step once it is done."""

    def __init__(self, watch: "SchedulerWatch", name: str):
        self.watch, self.name = watch, name
        self.original = getattr(watch.scheduler, name)
        functools.update_wrapper(self, self.original, updated=())  # pipelines read the signature

    def __call__(self, *args, **kwargs):
        result = self.original(*args, **kwargs)
        self.watch.announce(self.name == "set_timesteps", self.name == "step")
        return result

    def __deepcopy__(self, memo):
        """A copied scheduler gets its own plain method; this one would drive the scheduler that was copied."""
        return copy.deepcopy(self.original, memo)


class WatchedState(Protocol):
    """What a :class:`SchedulerWatch` tells: the state of a selection, or of a cache.

    Attributes:
        adapter: of the model's family.
        batched_guidance: whether the batch is (unconditional, conditional).
    """

    adapter: ModelAdapter
    batched_guidance: bool

    def at(self, sigma: float) -> None:
        """The coming step has this noise level."""

    def forget(self) -> None:
        """The run is over."""

    def new_run(self) -> None:
        """A run begins, or is over: nothing is carried on."""

    def check_guidance(self, guides: bool) -> None:
        """Raise ValueError if the pipeline must not guide, or must."""


class SchedulerWatch:
    """Tells a state what a pipeline is about to do: the step's noise level, and whether it guides.

    The level must be a Python number before a compiled transformer runs, so it cannot be read from the timestep tensor.

    Args:
        pipeline: has a ``scheduler``, and ``do_classifier_free_guidance`` if it guides.
        state: of the transformer's hooks.
        batched_guidance: what the state is told instead of the pipeline's own word.
    """

    METHODS = ("set_timesteps", "set_begin_index", "step")

    def __init__(self, pipeline, state: WatchedState, batched_guidance: bool | None = None):
        self.pipeline, self.state, self.batched_guidance = pipeline, state, batched_guidance
        untold = batched_guidance is None and not hasattr(type(pipeline), "do_classifier_free_guidance")
        if untold and state.adapter.guides_in_batch and state.adapter.batched_guidance({}, True):
            warnings.warn(
                f"shiva_ext: {type(pipeline).__name__} does not tell whether it guides, so each half of a guided batch "
                "decides for itself; pass enable(..., batched_guidance=True) where guidance_scale is above 1, False to "
                "silence this",
                stacklevel=3,
            )
        self._attach()

    def _attach(self) -> None:
        if type(self.pipeline.scheduler).__name__ == "SCMScheduler":
            raise ValueError(
                "shiva_ext: SCMScheduler's timesteps are angles, from which no noise level is read; enable on the "
                "transformer itself and call handle.at(sigma) before each step"
            )
        self.scheduler = self.pipeline.scheduler
        self.levels: list[float] = []  # of all steps
        self.index = 0  # of the coming one
        self.entry: Tensor | None = None  # of the scheduler's timesteps: the announced one
        for name in self.METHODS:
            if hasattr(self.scheduler, name):
                setattr(self.scheduler, name, _Announcing(self, name))

    def refresh(self) -> None:
        """Catch up with what no method of the scheduler tells: another scheduler, or guidance changed by a callback."""
        if self.pipeline.scheduler is not self.scheduler:
            self.remove()
            self._attach()
            self.announce(reread=True)
        self._read_guidance()

    def announce(self, reread: bool, stepped: bool = False) -> None:
        """Give the state the level of the scheduler's next step.

        Args:
            reread: its steps have changed.
            stepped: it has made one.
        """
        scheduler = self.scheduler
        if reread:
            self.index = 0
            self.levels = [min(max(t / 1000, 0.0), 1.0) for t in scheduler.timesteps.tolist()]
            self.version = _version(scheduler.timesteps)
            self.state.new_run()
        if hasattr(scheduler, "step_index"):
            index = scheduler.step_index
            index = (getattr(scheduler, "begin_index", None) or 0) if index is None else index
        else:  # DDIM and its like do not tell; they make one step after the other
            index = self.index + stepped
        self.entry = None
        self.index = index
        if index < len(self.levels):
            self.entry = scheduler.timesteps[index]
            self.state.at(self.levels[index])
        else:
            self.state.forget()  # the last step is done
            self.state.new_run()
        self._read_guidance()

    def announced(self, timestep: Tensor) -> bool:
        """Whether a call's timesteps [B] are a view of the announced entry of the scheduler's: then it is known.

        To read a value would wait for the GPU, in every step.
        """
        entry = self.entry
        return (
            entry is not None
            and timestep.untyped_storage().data_ptr() == entry.untyped_storage().data_ptr()
            and timestep.storage_offset() == entry.storage_offset()
            and _version(timestep) == self.version  # nobody has written into them
            and all(size == 1 or stride == 0 for size, stride in zip(timestep.shape, timestep.stride(), strict=True))
        )

    def _read_guidance(self) -> None:
        running = self.entry is not None
        told = running and bool(getattr(self.pipeline, "do_classifier_free_guidance", False))
        self.state.check_guidance(told)
        if self.batched_guidance is None:
            guides = told and self.state.adapter.guides_in_batch
            # Perturbed attention guidance adds a third part to the batch: there are no halves to agree.
            guides = guides and not getattr(self.pipeline, "do_perturbed_attention_guidance", False)
            self.state.batched_guidance = guides

    def remove(self) -> None:
        """Give the scheduler its methods back, also from under those of a later watch."""
        scheduler = self.scheduler
        for name in self.METHODS:
            outer, method = None, vars(scheduler).get(name)
            while isinstance(method, _Announcing) and method.watch is not self:
                outer, method = method, method.original
            if not isinstance(method, _Announcing):
                continue
            if outer is not None:
                outer.original = method.original
            elif getattr(method.original, "__func__", None) is getattr(type(scheduler), name):
                delattr(scheduler, name)
            else:
                setattr(scheduler, name, method.original)
