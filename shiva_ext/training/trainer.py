"""The three stages of Shiva-DiT training (arXiv 2602.05605, section 3.5), on one process or many."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from shiva_ext import adapter_weights, hooks
from shiva_ext.artifact import ADAPTER_NAME, ShivaArtifact
from shiva_ext.models import adapter_for
from shiva_ext.selection import BudgetLoss, RatioPolicy, RatioTable, ShivaRouter, get_estimator

from . import checkpoint
from .config import ADAPTER_TARGETS, FREE, TrainConfig
from .display import PlainDisplay
from .losses import distillation_loss, distilled_layers
from .merged_adapters import multiply_merged
from .objectives import FlowMatching, Objective
from .processes import average, gather_gradients, rank, shard, unsharded, world
from .recipes import Recipe, recipe_for
from .sampling import derive_seed, shared_ratios, stratified_ratios, stratified_timesteps
from .stages import run_student, run_teacher
from .start import load_start


class Batch(NamedTuple):
    """Training samples: latents [B,...], and what the transformer is conditioned on, by argument, [B,...] each."""

    latents: Tensor
    conditions: dict[str, Tensor]


STAGES = ("router", "policy", "joint")


class ShivaTrainer:
    """Trains router, policy and adapters of one transformer by its own objective and distillation.

    Args:
        transformer: the dense model; its own weights stay frozen and are the teacher's.
        config: see :class:`TrainConfig`.
        next_batch: gives ``n`` samples, prompts already dropped out: ``next_batch(n, generator) -> Batch``. What it
            gives must depend on the generator alone.
        router, policy: start from these instead of fresh ones.
        dense: train only the adapters, without pruning: the control experiment.
        objective: what the model predicts; by default flow matching.
        recipe: how the model is called; by default its family's.
        display: is told of the progress, see :mod:`shiva_ext.training.display`; nothing is shown by default.
        after_step: called after each step with the trainer and the number of steps of all stages that are done.

    With torch.distributed initialised, every process takes its share of a step's micro-batches, and gradients, the
    budget and the logged losses are those of the whole batch.
    """

    def __init__(
        self,
        transformer: nn.Module,
        config: TrainConfig,
        next_batch: Callable[[int, torch.Generator], Batch],
        router: ShivaRouter | None = None,
        policy: RatioPolicy | None = None,
        dense: bool = False,
        objective: Objective | None = None,
        recipe: Recipe | None = None,
        display: PlainDisplay | None = None,
        after_step: Callable[["ShivaTrainer", int], None] | None = None,
    ):
        if config.micro_batches % world():
            raise ValueError(
                f"ShivaTrainer: micro_batches is {config.micro_batches}, wanted a multiple of the {world()} processes"
            )
        self.transformer, self.config, self.next_batch, self.dense = transformer, config, next_batch, dense
        self.objective, self.recipe = objective or FlowMatching(), recipe or recipe_for(transformer)
        self.display, self.after_step = display or PlainDisplay(quiet=True), after_step
        torch.manual_seed(config.seed)
        transformer.requires_grad_(False).eval()
        if config.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        self.device = next(transformer.parameters()).device
        adapter = adapter_for(transformer)
        dims = adapter.dims(transformer)
        self.num_layers = dims["num_layers"]
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
        self.state = hooks.SelectionState(self.artifact, adapter)
        self.layers = distilled_layers(self.num_layers, config.feature_every)
        self.lora: LoraConfig | None = None
        self.history: list[dict] = []
        self.recent: list[dict] = []  # the terms of the steps since the last entry of the history
        self.bad_steps = 0  # without a finite gradient, one after the other
        self.kept: dict[int, int] = {}  # tokens of the last call, by layer
        if config.sharding == "fsdp":
            shard(transformer, adapter.blocks(transformer))
        hooks.attach(transformer, self.state)

    def close(self) -> None:
        """Leave the transformer as it was found (but sharded, if it was sharded)."""
        hooks.detach(self.transformer)
        if self.lora is not None:
            adapter_weights.remove(self.transformer)

    def add_adapters(self) -> None:
        """Inject trainable DoRA adapters into all attention and MLP linears of the blocks."""
        rank = self.config.adapter_rank
        self.lora = LoraConfig(r=rank, lora_alpha=rank, use_dora=True, target_modules=ADAPTER_TARGETS, lora_dropout=0.0)
        torch.manual_seed(derive_seed(self.config.seed, "adapters"))
        with unsharded(self.state.adapter.blocks(self.transformer)):  # DoRA starts from the norms of the weights
            adapter_weights.inject(self.transformer, self.lora)
            for p in self._adapter_weights().values():
                p.data = p.data.float()  # in bfloat16 a small step would round to none
        if self.start is not None:
            adapter_weights.load(self.transformer, self.start.adapter)
        multiply_merged(self.transformer, adapter_weights.NAME)

    def _adapter_weights(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.transformer.named_parameters() if p.requires_grad}

    def _groups(self, stage: str) -> list[dict]:
        config = self.config
        groups = []
        if not self.dense:
            groups.append(dict(params=list(self.router.parameters()), peak=config.lr_router))
            if stage != "router":
                groups.append(dict(params=list(self.policy.parameters()), peak=config.lr_policy))
        if stage == "joint" and self.lora is not None:
            groups.append(dict(params=list(self._adapter_weights().values()), peak=config.lr_adapter))
        return groups

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

    def loss(self, stage: str, sigma: Tensor, warm: Tensor, generator: torch.Generator) -> tuple[Tensor, dict]:
        """The loss of one micro-batch with noise levels sigma [B], less the budget's, and its terms."""
        config = self.config
        # Drawn on the CPU, so that a seed means the same on every device.
        batch = self.next_batch(len(sigma), generator)
        noise = torch.randn(batch.latents.shape, generator=generator).to(self.device)
        latents, sigma = batch.latents.to(self.device), sigma.to(self.device)
        conditions = {name: value.to(self.device) for name, value in batch.conditions.items()}
        noisy = self.objective.noisy(latents, noise, sigma)
        wanted = self.objective.target(latents, noise, sigma)
        inputs = self.recipe.inputs(self.transformer, noisy, self.objective.timestep(sigma), conditions)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            if self.dense:
                self.state.active = False
                output = self.transformer(**inputs, return_dict=False)[0]
                error = F.mse_loss(self.recipe.prediction(output, noisy).float(), wanted)
                return error, {"diffusion": error.detach()}
            teacher = run_teacher(self.transformer, self.state, **inputs)
            ratios = self._ratios(stage, sigma, warm)
            output, student = run_student(self.transformer, self.state, self.estimator, ratios, teacher, **inputs)
        features = [layer for layer in self.layers if layer in student.outputs]
        terms = {
            "diffusion": F.mse_loss(self.recipe.prediction(output, noisy).float(), wanted),
            "output": F.mse_loss(output.float(), teacher.output.float()),
            "features": distillation_loss(
                [student.outputs[layer] for layer in features], [teacher.tokens[layer][1] for layer in features]
            ),
        }
        total = (
            config.diffusion_weight * terms["diffusion"]
            + config.output_weight * terms["output"]
            + config.feature_weight * terms["features"]
        )
        self.kept = {layer: index.shape[1] for layer, index in student.kept.items()}
        record = {k: v.detach() for k, v in terms.items()}
        if not student.finite:
            total = total + math.nan
        record["ratio"] = ratios.detach()[self.artifact.first_layer :].mean()
        return total, record

    def _backward(self, stage: str, step: int) -> dict[str, float] | None:
        """Gradients of one step and its mean terms over all processes; None if they are not finite."""
        config, micro = self.config, self.config.micro_batches
        generator = torch.Generator().manual_seed(derive_seed(config.seed, stage, step))
        warm = stratified_ratios(micro, config.ratio_min, config.ratio_max, generator)
        sigmas = [stratified_timesteps(config.batch_size // micro, i, micro, generator) for i in range(micro)]
        share = micro // world()
        finite, records = True, []
        if stage != "router" and not self.dense:
            self.budget_term(torch.cat(sigmas)).backward()
        for part in range(rank() * share, (rank() + 1) * share):
            seed = derive_seed(config.seed, stage, step, part)
            torch.manual_seed(seed)  # of the noise on scores and ratios, which checkpointing must be able to repeat
            loss, record = self.loss(stage, sigmas[part], warm[part], torch.Generator().manual_seed(seed))
            (loss / share).backward()
            finite = finite and bool(torch.isfinite(loss))
            records.append({name: float(value) for name, value in record.items()})
        # Every process learns whether all are well before any of them steps.
        if average(torch.tensor(float(finite)), self.device).item() < 1:
            return None
        names = list(records[0])
        sums = average(torch.tensor([[r[name] for name in names] for r in records]).mean(dim=0), self.device)
        return dict(zip(names, sums.tolist(), strict=True))

    def run_stage(
        self,
        stage: str,
        steps: int,
        start: int = 0,
        optimizer_state: dict[str, Tensor] | None = None,
        checkpoints: Path | None = None,
    ) -> None:
        """Train one of :data:`STAGES` up to a number of steps.

        Args:
            stage: its name.
            steps: its length.
            start: steps that are done already.
            optimizer_state: of them, see :func:`checkpoint.flatten`.
            checkpoints: folder to write checkpoints in, every ``checkpoint_every`` steps and at the end.

        Raises:
            FloatingPointError: more than ``max_bad_steps`` steps, one after the other, had no finite gradient.
        """
        config = self.config
        if start >= steps:
            return
        if stage == "joint" and config.adapter_rank and self.lora is None:
            self.add_adapters()
        optimizer = torch.optim.AdamW(self._groups(stage), lr=0.0, betas=(0.9, 0.99), weight_decay=0.01)
        if optimizer_state:
            checkpoint.unflatten(optimizer, optimizer_state)
        warmup = min(config.warmup, steps // 4)
        before, total = config.steps_before(stage), config.steps_before("end")
        self.display.stage(stage, start, steps, config.batch_size)
        for step in range(start, steps):
            fall = config.lr_end + (1 - config.lr_end) * (steps - step) / max(1.0, config.decay * steps)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * min(1.0, (step + 1) / max(1, warmup), fall)
            self.estimator.progress = (before + step) / total
            optimizer.zero_grad(set_to_none=True)
            mean = self.budget_loss.mu.clone()
            record = self._backward(stage, step)
            if record is not None:
                params = [p for group in optimizer.param_groups for p in group["params"]]
                gather_gradients(params)
                norms = [nn.utils.clip_grad_norm_(group["params"], 1.0) for group in optimizer.param_groups]
                if not all(math.isfinite(norm) for norm in norms):
                    record = None
            if record is None:
                self.budget_loss.mu.copy_(mean)
                self._skip(stage, step)
            else:
                self.bad_steps = 0
                optimizer.step()
                self.recent.append(record)
            self.display.step(step + 1, record, self.kept)
            if (step + 1) % config.log_every == 0 or step + 1 == steps:
                self._log(stage, step + 1)
            if self.after_step is not None:
                self.after_step(self, before + step + 1)
            due = config.checkpoint_every and (step + 1) % config.checkpoint_every == 0
            if checkpoints is not None and (due or step + 1 == steps) and rank() == 0:
                self.save(checkpoints, stage, step + 1, before + step + 1, optimizer)
        optimizer.zero_grad(set_to_none=True)

    def _skip(self, stage: str, step: int) -> None:
        self.bad_steps += 1
        text = f"step {step + 1} of the {stage} stage has no finite gradient"
        if self.bad_steps > self.config.max_bad_steps:
            raise FloatingPointError(
                f"ShivaTrainer: {text}, nor had the {self.bad_steps - 1} before it; start a new run with lower "
                "learning rates (the last checkpoint is whole, but would come by the same steps again)"
            )
        self.display.warn(f"{text}: skipped ({self.bad_steps} in a row, stops after {self.config.max_bad_steps})")

    def _log(self, stage: str, step: int) -> None:
        if not self.recent:
            return
        mean = {k: sum(r[k] for r in self.recent) / len(self.recent) for k in self.recent[0]}
        if stage != "router" and not self.dense:
            mean["budget_error"] = float(self.budget_loss.mu) - self.config.budget
        self.history.append({"stage": stage, "step": step, **{k: round(v, 5) for k, v in mean.items()}})
        self.recent = []
        self.display.log(self.history[-1])

    def save(self, folder: Path, stage: str, step: int, done: int, optimizer: torch.optim.Optimizer) -> Path:
        """Write a checkpoint of everything that the rest of the run depends on; ``done`` counts steps of all stages."""
        tensors = {f"optimizer.{key}": value for key, value in checkpoint.flatten(optimizer).items()}
        tensors |= {f"adapter.{name}": p for name, p in self._adapter_weights().items()}
        for name in ("router", "policy", "budget_loss"):
            tensors |= {f"{name}.{key}": value for key, value in getattr(self, name).state_dict().items()}
        record = dict(
            stage=stage,
            stage_step=step,
            config=asdict(self.config),
            history=self.history,
            recent=self.recent,
            bad_steps=self.bad_steps,
        )
        return checkpoint.write(folder, done, tensors, record, self.config.keep_checkpoints)

    def _restore(self, folder: Path) -> tuple[str, int, dict[str, Tensor]] | None:
        """Take up the newest checkpoint: its stage, the stage's steps that are done, and the optimizer's state."""
        found = checkpoint.latest(folder)
        if found is None:
            return None
        tensors, record = found
        wanted = {name: value for name, value in asdict(self.config).items() if name not in FREE}
        other = [f"{k} {record['config'].get(k)} (now {v})" for k, v in wanted.items() if record["config"].get(k) != v]
        if other:
            raise ValueError(
                f"shiva_ext: the run in {folder} was started with other settings: {', '.join(other)}; resume with the "
                "same ones, or start a new run in another folder"
            )

        def part(prefix: str) -> dict[str, Tensor]:
            return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

        for name in ("router", "policy", "budget_loss"):
            getattr(self, name).load_state_dict(part(f"{name}."))
        weights = part("adapter.")
        if weights:
            self.add_adapters()
            with torch.no_grad():
                for name, p in self._adapter_weights().items():
                    p.copy_(weights[name])
        self.history, self.recent = record["history"], record["recent"]
        self.bad_steps = record["bad_steps"]
        return record["stage"], record["stage_step"], part("optimizer.")

    def run(self, checkpoints: str | os.PathLike | None = None, resume: bool = False) -> None:
        """Train all stages.

        Args:
            checkpoints: folder for checkpoints; None writes none.
            resume: go on from the newest one, if there is any. The result is that of an uninterrupted run, on the CPU
                bit for bit.

        Raises:
            ValueError: the folder holds a run that was not asked for or has other settings, or none of its checkpoints
                can be read.
        """
        folder = None if checkpoints is None else Path(checkpoints)
        if folder is not None and not resume and checkpoint.steps(folder):
            raise ValueError(f"shiva_ext: {folder} holds a run already; resume it, or choose another folder")
        found = self._restore(folder) if resume and folder is not None and folder.exists() else None
        at, start, optimizer = found or (STAGES[0], 0, None)
        started = time.monotonic()
        for stage in STAGES[STAGES.index(at) :]:
            if not self.dense or stage == "joint":
                self.run_stage(stage, getattr(self.config, f"{stage}_steps"), start, optimizer, folder)
            start, optimizer = 0, None
        if self.history:
            self.history[-1]["seconds"] = round(time.monotonic() - started)
        self.display.close()

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
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config
        adapter = None
        if self.lora is not None:
            adapter = folder / ADAPTER_NAME
            adapter.mkdir(exist_ok=True)
            weights = get_peft_model_state_dict(self.transformer, adapter_name=adapter_weights.NAME)
            weights = {k: v.detach().to(torch.bfloat16).contiguous() for k, v in weights.items()}
            save_file(weights, adapter / "adapter_model.safetensors.tmp")
            os.replace(adapter / "adapter_model.safetensors.tmp", adapter / "adapter_model.safetensors")
            self.lora.inference_mode = True
            self.lora.save_pretrained(str(adapter))
        metadata = {"training": asdict(config), "dense_control": self.dense, "history": self.history}
        metadata |= {"source": source} if source else {}
        metadata |= {"started_from": self.start.metadata} if self.start is not None else {}
        artifact = replace(self.artifact, table=self.table(), adapter=adapter, metadata=metadata)
        artifact.save(folder)
        return artifact
