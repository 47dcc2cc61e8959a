"""Fine-tuning of the other trained methods, with Shiva's data, teacher, losses and adapters."""

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from shiva_ext import hooks
from shiva_ext.artifact import MethodSource
from shiva_ext.method_artifact import MethodArtifact
from shiva_ext.methods import TRAINED, TrainedMethod
from shiva_ext.models import adapter_for

from .config import TrainConfig
from .loop import Batch, TrainingLoop
from .sampling import regional_timesteps, stratified_timesteps


class MethodPass:
    """Takes over every hooked block for one training call; set as ``SelectionState.trainer``.

    Attributes:
        outputs: image tokens after each hooked block, by layer.
    """

    def __init__(self, state: hooks.SelectionState):
        self.state = state
        self.outputs: dict[int, Tensor] = {}

    def run_block(self, layer: int, x: Tensor, run):
        output = self.state.method.run_block(hooks.block_call(self.state, layer, "", x, run, training=True))
        self.outputs[layer] = self.state.adapter.image_tokens(output)
        return output


def check_method(transformer: nn.Module, config: TrainConfig, method: TrainedMethod | None = None) -> TrainedMethod:
    """The method to train; all that can be wrong with it for this model is found here.

    Raises:
        TypeError, ValueError: it is unknown, or not for this model or these settings.
    """
    if method is None and config.method not in TRAINED:
        raise ValueError(f"shiva_ext: method is {config.method!r}, wanted one of {', '.join(TRAINED)}")
    if config.start_from:
        raise ValueError(f"shiva_ext: start_from is for Shiva's own selection, not for {config.method}; leave it empty")
    adapter = adapter_for(transformer)
    method = method or TRAINED[config.method].for_budget(config.budget, adapter, transformer)
    with torch.random.fork_rng(devices=[]):
        method.build(adapter, transformer)
    return method


class MethodTrainer(TrainingLoop):
    """Trains one of :data:`shiva_ext.methods.TRAINED` and adapters, in a single stage of ``joint_steps``.

    The method's weights learn at ``lr_router``, those that set how much is kept at ``lr_policy``. The loss is that of
    Shiva's joint stage, with the method's own term in place of the budget's.

    Args:
        transformer, config, next_batch, loop: see :class:`TrainingLoop`; ``config.method`` names the method.
        method: its settings; by default those for ``config.budget``.
    """

    def __init__(
        self,
        transformer: nn.Module,
        config: TrainConfig,
        next_batch: Callable[[int, torch.Generator], Batch],
        method: TrainedMethod | None = None,
        **loop,
    ):
        method = check_method(transformer, config, method)
        super().__init__(transformer, config, next_batch, **loop)
        adapter, self.method = adapter_for(transformer), method
        self.weights = self.method.build(adapter, transformer).to(self.device)
        self.progress = 0.0
        self.attach(hooks.SelectionState(MethodSource(self.method, self.num_layers, self.weights), adapter))

    def parts(self) -> dict[str, nn.Module]:
        return {"method": self.weights}

    def groups(self, stage: str) -> list[dict]:
        schedule = self.method.schedule_weights(self.weights)
        own = [p for p in self.weights.parameters() if all(p is not each for each in schedule)]
        # Without weight decay, which would pull open gates and identities towards 0.
        groups = [dict(params=own, peak=self.config.lr_router, weight_decay=0.0)]
        more = dict(params=schedule, peak=self.config.lr_policy, weight_decay=0.0)
        return [*groups, more] if schedule else groups

    def settings(self) -> dict:
        return {f"{type(self.method).__name__}.{name}": value for name, value in asdict(self.method).items()}

    def draw(self, generator: torch.Generator) -> list[tuple[Tensor, ...]]:
        """Noise levels of the whole range, or of one region a micro-batch, each another while there are enough."""
        micro, regions = self.config.micro_batches, self.method.regions
        size = self.config.batch_size // micro
        if regions == 1:
            return [(stratified_timesteps(size, i, micro, generator),) for i in range(micro)]
        return [(levels,) for levels in regional_timesteps(size, micro, regions, generator)]

    def before_step(self, stage: str, step: int, progress: float) -> None:
        self.progress = progress

    def after_update(self) -> None:
        self.method.constrain(self.weights)

    def loss(self, stage: str, drawn: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, dict]:
        call, state = self.call(drawn[0], generator), self.state
        state.at(float(drawn[0].mean()), fixed=True)
        with self.autocast():
            teacher = self.run_teacher(call)
            state.trainer = student = MethodPass(state)
            try:
                output = self.transformer(**call.inputs, return_dict=False)[0]
            finally:
                state.trainer = None
                state.forget()
            factor = self.method.dense_weight(self.progress)
            whole = self._whole(call) if factor else None
        total, record = self.distilled(output, call, student.outputs, teacher)
        own = self.method.penalty(self.weights, state.scratch, self.progress)
        if own is not None:
            total, record["own"] = total + own, own.detach()
        if whole is not None:
            outputs, captured = whole
            total = total + factor * self.distilled(outputs, call, captured, teacher)[0]
        return total, record

    def _whole(self, call) -> tuple[Tensor, dict[int, Tensor]]:
        """The model with its adapters and without the method."""
        state = self.state
        state.active, state.captured = False, {}
        try:
            output = self.transformer(**call.inputs, return_dict=False)[0]
            return output, {layer: tokens[1] for layer, tokens in state.captured.items()}
        finally:
            state.active, state.captured = True, None

    def export(self, folder: str | os.PathLike, source: dict | None = None) -> MethodArtifact:
        """Write the artefact: settings, weights and adapters.

        Args:
            folder: to write; created if needed.
            source: JSON values about the model, for the metadata.
        """
        metadata = {"training": asdict(self.config), "history": self.history} | ({"source": source} if source else {})
        artifact = MethodArtifact(
            type(self.transformer).__name__,
            self.method,
            {name: value.detach().clone() for name, value in self.weights.state_dict().items()},
            self.export_adapter(Path(folder)),
            metadata,
        )
        artifact.save(folder)
        return artifact
