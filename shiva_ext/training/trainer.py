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

from .config import TrainConfig
from .loop import Batch, TrainingLoop
from .sampling import shared_ratios, stratified_ratios, stratified_timesteps
from .stages import run_student
from .start import load_start

STAGES = ("router", "policy", "joint")

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
        self.dense, self.stages = dense, STAGES[-1:] if dense else STAGES
        adapter = adapter_for(transformer)
        dims = adapter.dims(transformer)
        self.router = (router or ShivaRouter(**dims, share=config.share, hidden=config.hidden)).to(self.device)
        self.policy = (policy or RatioPolicy(self.num_layers, min(config.budget, 0.99))).to(self.device)
        self.budget_loss = BudgetLoss(config.budget, config.budget_weight).to(self.device)
        self.estimator = get_estimator(config.estimator)
        self.artifact = ShivaArtifact(
            type(transformer).__name__,
            self.router,
            RatioTable.fixed(config.budget, self.num_layers),
            self.policy,
            share_selection=config.share_selection,
        )
        self.start = load_start(config, self.artifact) if config.start_from else None
        self.adapters_from = None if self.start is None else self.start.adapter
        self.attach(hooks.SelectionState(self.artifact, adapter))

    def parts(self) -> dict[str, nn.Module]:
        return {"router": self.router, "policy": self.policy, "budget_loss": self.budget_loss}

    def groups(self, stage: str) -> list[dict]:
        if self.dense:
            return []
        groups = [dict(params=list(self.router.parameters()), peak=self.config.lr_router)]
        if stage != "router":
            groups.append(dict(params=list(self.policy.parameters()), peak=self.config.lr_policy))
        return groups

    def draw(self, generator: torch.Generator) -> list[tuple[Tensor, ...]]:
        """Noise levels [B], and the first stage's ratio."""
        config, micro = self.config, self.config.micro_batches
        warm = stratified_ratios(micro, config.ratio_min, config.ratio_max, generator)
        return [(stratified_timesteps(config.batch_size // micro, i, micro, generator), warm[i]) for i in range(micro)]

    def _ratios(self, stage: str, sigma: Tensor, warm: Tensor) -> Tensor:
        """This call's ratios [L]."""
        if stage == "router":
            ratios = torch.full((self.num_layers,), float(warm), device=self.device)
            ratios[: self.artifact.first_layer] = 1
            return ratios
        return shared_ratios(self.policy(sigma, noise=self.config.policy_noise if stage == "policy" else 0.0))

    def budget_term(self, sigmas: Tensor) -> Tensor:
        """The budget loss of one step, over the noise levels [batch_size] of all its micro-batches.

        Once a step, not once a micro-batch: those lie at rising noise levels, and a moving average over them would
        remember the last ones best. Without exploration noise, which pulls the mean ratio towards one half.
        """
        return self.budget_loss(self.policy(sigmas.to(self.device)))

    def once_a_step(self, stage: str, sigmas: Tensor) -> Tensor | None:
        return None if stage == "router" or self.dense else self.budget_term(sigmas)

    def before_step(self, progress: float) -> None:
        self.estimator.progress = progress * self.config.anneal_to

    def carried(self) -> Tensor:
        return self.budget_loss.mu

    def loss(self, stage: str, drawn: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, dict]:
        """The loss of one micro-batch, less the budget's, and its terms."""
        sigma, warm = drawn
        call = self.call(sigma, generator)
        sigma = sigma.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
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
            output, student = run_student(self.transformer, self.state, self.estimator, ratios, teacher, **call.inputs)
        total, record = self.distilled(output, call, student.outputs, teacher)
        self.kept = {layer: index.shape[1] for layer, index in student.kept.items()}
        if not student.finite:
            total = total + math.nan
        record["ratio"] = ratios.detach()[self.artifact.first_layer :].mean()
        return total, record

    def logged(self, stage: str) -> dict[str, float]:
        if stage == "router" or self.dense:
            return {}
        return {"budget_error": float(self.budget_loss.mu) - self.config.budget}

    def table(self) -> RatioTable:
        """The policy's ratios at even noise levels, moved to the budget."""
        config = self.config
        if self.dense:
            return RatioTable.fixed(1.0, self.num_layers)
        levels = [(i + 1) / config.table_levels for i in range(config.table_levels)]
        return RatioTable.from_policy(self.policy, levels).with_budget(
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
