"""The three stages of Shiva-DiT training (arXiv 2602.05605, section 3.5), on one process or many."""

import math
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shiva_ext import hooks
from shiva_ext.artifact import ShivaArtifact
from shiva_ext.models import adapter_for
from shiva_ext.selection import BudgetLoss, RatioPolicy, RatioTable, ShivaRouter, get_estimator
from shiva_ext.selection.allocation import RatioSchedule

from .config import TrainConfig
from .loop import Batch, Call, TrainingLoop
from .measure import ratio_values
from .processes import average, rank, world
from .sampling import derive_seed, regional_timesteps, shared_ratios, stratified_ratios
from .stages import StudentPass, Teacher, run_student
from .start import load_start

STAGES = ("router", "policy", "joint")
MEASURED_LEVELS = 10  # of a measured schedule, at most

__all__ = ["STAGES", "Batch", "ShivaTrainer"]


class ShivaTrainer(TrainingLoop):
    """Trains router, policy and adapters of one transformer by its own objective and distillation.

    Args:
        transformer, config, next_batch, loop: see :class:`TrainingLoop`.
        router, policy: start from these instead of fresh ones.
        dense: train only the adapters, without pruning: the control experiment.

    With torch.distributed initialised the budget, too, is that of the whole batch.
    """

    def __init__(
        self,
        transformer: nn.Module,
        config: TrainConfig,
        next_batch: Callable[[int, torch.Generator], Batch],
        router: ShivaRouter | None = None,
        policy: RatioPolicy | None = None,
        dense: bool = False,
        **loop,
    ):
        super().__init__(transformer, config, next_batch, **loop)
        self.dense, self.measured = dense, config.schedule == "measured" and not dense
        self.stages = STAGES[-1:] if dense else STAGES[::2] if self.measured else STAGES
        adapter = adapter_for(transformer)
        dims = adapter.dims(transformer)
        first = dict(first_layer=config.first_layer)
        router = router or ShivaRouter(**dims, share=config.share, hidden=config.hidden, **first)
        if self.measured:
            levels = min(config.table_levels, MEASURED_LEVELS)
            self.schedule = RatioSchedule(levels, self.num_layers, config.budget, **first).to(self.device)
        else:
            policy = policy or RatioPolicy(self.num_layers, min(config.budget, 0.99), **first)
            self.schedule = policy.to(self.device)
        self.router = router.to(self.device)
        self.budget_loss = BudgetLoss(config.budget, config.budget_weight, **first).to(self.device)
        self.regions = config.regions or (MEASURED_LEVELS if self.measured else config.micro_batches)
        self.estimator = get_estimator(config.estimator)
        self.artifact = ShivaArtifact(
            type(transformer).__name__,
            self.router,
            RatioTable.fixed(config.budget, self.num_layers, **first),
            None if self.measured else self.policy,
            share_selection=config.share_selection,
        )
        self.start = load_start(config, self.artifact) if config.start_from else None
        if self.start is not None and self.measured:
            table = self.start.table.with_budget(config.budget, adapter.num_tokens(transformer))
            self.schedule.ratios.copy_(table.at_levels(self.schedule.sigmas).ratios_tensor)
        self.adapters_from = None if self.start is None else self.start.adapter
        self.attach(hooks.SelectionState(self.artifact, adapter))

    def parts(self) -> dict[str, nn.Module]:
        name = "schedule" if self.measured else "policy"
        return {"router": self.router, name: self.schedule, "budget_loss": self.budget_loss}

    @property
    def policy(self) -> RatioPolicy:
        """What learns the ratios.

        Raises:
            AttributeError: they are measured, see :attr:`TrainConfig.schedule`.
        """
        if self.measured:
            raise AttributeError("ShivaTrainer: the schedule is measured, without a policy; see .schedule")
        return self.schedule

    def groups(self, stage: str) -> list[dict]:
        if self.dense:
            return []
        groups = [dict(params=list(self.router.parameters()), peak=self.config.lr_router)]
        if stage != "router" and not self.measured:
            groups.append(dict(params=list(self.policy.parameters()), peak=self.config.lr_policy))
        return groups

    def draw(self, generator: torch.Generator) -> list[tuple[Tensor, ...]]:
        """Noise levels [B], and the first stage's ratio."""
        config, micro = self.config, self.config.micro_batches
        warm = stratified_ratios(micro, config.ratio_min, config.ratio_max, generator)
        levels = regional_timesteps(config.batch_size // micro, micro, self.regions, generator)
        return list(zip(levels, warm, strict=True))

    def _ratios(self, stage: str, sigma: Tensor, warm: Tensor) -> Tensor:
        """This call's ratios [L]."""
        if stage == "router":
            ratios = torch.full((self.num_layers,), float(warm), device=self.device)
            ratios[: self.artifact.first_layer] = 1
            return ratios
        if self.measured:
            return shared_ratios(self.schedule(sigma))
        return shared_ratios(self.policy(sigma, noise=self.config.policy_noise if stage == "policy" else 0.0))

    def budget_term(self, sigmas: Tensor) -> Tensor:
        """The budget loss of one step, over the noise levels [batch_size] of all its micro-batches.

        Once a step, not once a micro-batch: those lie at rising noise levels, and a moving average over them would
        remember the last ones best. Without exploration noise, which pulls the mean ratio towards one half.
        """
        return self.budget_loss(self.policy(sigmas.to(self.device)))

    def once_a_step(self, stage: str, sigmas: Tensor) -> Tensor | None:
        if stage == "router" or self.dense or self.measured:
            return None
        if self.regions > self.config.micro_batches:  # the step has seen some of the levels
            sigmas = (torch.arange(len(sigmas)) + 0.5) / len(sigmas)
        return self.budget_term(sigmas)

    def before_step(self, stage: str, step: int, progress: float) -> None:
        self.estimator.progress = progress * self.config.anneal_to
        if self.measured and stage == "joint" and step in self._moments():
            self.schedule.update(self.ratio_values(step), self.config.budget)

    def _moments(self) -> list[int]:
        """Steps of the joint stage before which the schedule is measured."""
        count = self.config.schedule_updates
        return [self.config.joint_steps * 3 * (2 * i + 1) // (8 * count) for i in range(count)]

    @torch.no_grad()
    def ratio_values(self, step: int) -> Tensor:
        """How much nearer each ratio of the schedule brings the output to the teacher's, per unit, [S,L].

        Not the whole loss: its part that no schedule changes is noise. Processes share the levels. float64, on the CPU.
        """
        config, per_call = self.config, self.config.batch_size // self.config.micro_batches
        calls, levels = math.ceil(config.schedule_samples / per_call), self.schedule.sigmas.tolist()
        values, noise = torch.zeros(self.schedule.ratios.shape, dtype=torch.float64), self.estimator.noise_fraction
        self.estimator.noise_fraction = 0.0
        try:
            for turn in range(math.ceil(len(levels) / world())):
                i = turn * world() + rank()
                if extra := i >= len(levels):  # all processes run equally often: sharded weights want that
                    i = len(levels) - 1
                for part in range(calls):
                    seed = derive_seed(config.seed, "schedule", step, i, part)
                    call = self.call(torch.full((per_call,), levels[i]), torch.Generator().manual_seed(seed))
                    with self.autocast():
                        teacher = self.run_teacher(call)

                    def loss(ratios: Tensor, call=call, teacher=teacher, seed=seed) -> float:
                        torch.manual_seed(seed)  # what an estimator draws, too
                        return float(self.student_loss(call, ratios, teacher)[1]["output"])

                    found = ratio_values(loss, self.schedule.ratios[i], self.schedule.first_layer)
                    values[i] += 0 if extra else found / calls
        finally:
            self.estimator.noise_fraction = noise
        return average(values, self.device) * world()

    def student_loss(self, call: Call, ratios: Tensor, teacher: Teacher) -> tuple[Tensor, dict, StudentPass]:
        """A pruned pass: its loss, the loss's terms, and its record."""
        with self.autocast():
            output, student = run_student(self.transformer, self.state, self.estimator, ratios, teacher, **call.inputs)
        return *self.distilled(output, call, student.outputs, teacher), student

    def carried(self) -> Tensor:
        return self.budget_loss.mu

    def loss(self, stage: str, drawn: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, dict]:
        """The loss of one micro-batch, less the budget's, and its terms."""
        sigma, warm = drawn
        call = self.call(sigma, generator)
        sigma = sigma.to(self.device)
        with self.autocast():
            if self.dense:
                self.state.active = False
                output = self.transformer(**call.inputs, return_dict=False)[0]
                if self.config.guidance:
                    error = F.mse_loss(output.float(), self.run_teacher(call).output.float())
                    return error, {"output": error.detach()}
                error = self.diffusion_error(output, call)
                return error, {"diffusion": error.detach()}
            teacher = self.run_teacher(call)
            ratios = self._ratios(stage, sigma, warm)
        total, record, student = self.student_loss(call, ratios, teacher)
        self.kept = {layer: index.shape[1] for layer, index in student.kept.items()}
        if not student.finite:
            total = total + math.nan
        record["ratio"] = ratios.detach()[self.artifact.first_layer :].mean()
        return total, record

    def logged(self, stage: str) -> dict[str, float]:
        if stage == "router" or self.dense or self.measured:
            return {}
        return {"budget_error": float(self.budget_loss.mu) - self.config.budget}

    def table(self) -> RatioTable:
        """The ratios at even noise levels, moved to the budget."""
        config = self.config
        if self.dense:
            return RatioTable.fixed(1.0, self.num_layers, config.first_layer)
        levels = torch.arange(1, config.table_levels + 1) / config.table_levels
        with torch.no_grad():
            ratios = self.schedule(levels.to(self.device))
        return RatioTable(levels, ratios, config.first_layer).with_budget(
            config.budget,
            self.state.adapter.num_tokens(self.transformer),
            together=self.router.group_sizes() if config.share_selection else None,
        )

    def export(self, folder: str | os.PathLike, source: dict | None = None) -> ShivaArtifact:
        """Write the artefact: router, policy, its table solved for the budget, and the adapters.

        Args:
            folder: to write; created if needed.
            source: JSON values about the model, for the metadata.
        """
        adapter = self.export_adapter(Path(folder))
        metadata = {"training": asdict(self.config), "dense_control": self.dense, "history": self.history}
        metadata |= {"source": source} if source else {}
        metadata |= {"started_from": self.start.metadata} if self.start is not None else {}
        artifact = replace(self.artifact, table=self.table(), adapter=adapter, metadata=metadata)
        artifact.save(folder)
        return artifact
