"""The loop that every training here goes through: micro-batches, processes, schedules, checkpoints."""

import json
import math
import os
import time
from abc import ABC, abstractmethod
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
from shiva_ext.artifact import ADAPTER_NAME
from shiva_ext.cached import get_cache
from shiva_ext.models import adapter_for

from . import checkpoint
from .config import ADAPTER_TARGETS, FREE, TrainConfig
from .display import PlainDisplay
from .losses import distillation_loss, distilled_layers
from .merged_adapters import multiply_merged
from .objectives import FlowMatching, Objective
from .processes import average, gather_gradients, rank, shard, unsharded, world
from .recipes import Recipe, recipe_for
from .sampling import derive_seed
from .stages import Teacher, run_teacher


class Batch(NamedTuple):
    """Training samples.

    Attributes:
        latents: [B,...].
        conditions: what the transformer is conditioned on, by argument, [B,...] each.
        empty: the same of the empty prompt, [1,...] each; only distilled guidance wants it.
    """

    latents: Tensor
    conditions: dict[str, Tensor]
    empty: dict[str, Tensor] | None = None


class Call(NamedTuple):
    """One micro-batch as the transformer gets it.

    Attributes:
        noisy: latents at their noise levels.
        wanted: what the model's own objective wants to be predicted.
        inputs: arguments of the transformer.
        empty: the same with the empty prompt; None where guidance is not distilled.
    """

    noisy: Tensor
    wanted: Tensor
    inputs: dict
    empty: dict | None = None


class TrainingLoop(ABC):
    """Trains what a subclass adds to a frozen transformer, and DoRA adapters, in stages.

    Args:
        transformer: the dense model; its own weights stay frozen and are the teacher's.
        config: see :class:`TrainConfig`.
        next_batch: gives ``n`` samples, prompts already dropped out: ``next_batch(n, generator) -> Batch``. What it
            gives must depend on the generator alone.
        objective: what the model predicts; by default flow matching.
        recipe: how the model is called; by default its family's.
        display: is told of the progress, see :mod:`shiva_ext.training.display`; nothing is shown by default.
        after_step: called after each step with the trainer and the number of steps of all stages that are done.

    With torch.distributed initialised, every process takes its share of a step's micro-batches, and gradients and the
    logged losses are those of the whole batch.

    Attributes:
        stages: names of the stages, in their order; ``<name>_steps`` of the configuration is a stage's length. The
            adapters are trained in "joint".
        adapters_from: folder of adapters to begin with, or None for fresh ones.
    """

    stages: tuple[str, ...] = ("joint",)
    adapters_from: Path | None = None

    def __init__(
        self,
        transformer: nn.Module,
        config: TrainConfig,
        next_batch: Callable[[int, torch.Generator], Batch],
        objective: Objective | None = None,
        recipe: Recipe | None = None,
        display: PlainDisplay | None = None,
        after_step: Callable[["TrainingLoop", int], None] | None = None,
    ):
        if config.micro_batches % world():
            raise ValueError(
                f"{type(self).__name__}: micro_batches is {config.micro_batches}, wanted a multiple of the {world()} "
                "processes"
            )
        if get_cache(transformer) is not None:
            raise RuntimeError(
                f"{type(self).__name__}: the transformer has a cache, which takes from earlier steps what training has "
                "to compute; disable it first"
            )
        self.transformer, self.config, self.next_batch = transformer, config, next_batch
        self.objective, self.recipe = objective or FlowMatching(), recipe or recipe_for(transformer)
        self.display, self.after_step = display or PlainDisplay(quiet=True), after_step
        torch.manual_seed(config.seed)
        transformer.requires_grad_(False).eval()
        if config.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        self.device = next(transformer.parameters()).device
        self.num_layers = adapter_for(transformer).dims(transformer)["num_layers"]
        self.layers = distilled_layers(self.num_layers, config.feature_every)
        self.lora: LoraConfig | None = None
        self.history: list[dict] = []
        self.recent: list[dict] = []  # the terms of the steps since the last entry of the history
        self.bad_steps = 0  # without a finite gradient, one after the other
        self.kept: dict[int, int] = {}  # tokens of the last call, by layer

    @abstractmethod
    def parts(self) -> dict[str, nn.Module]:
        """What is trained or carried from step to step besides the adapters: it goes into checkpoints."""

    @abstractmethod
    def groups(self, stage: str) -> list[dict]:
        """Parameters of a stage, adapters aside, each group with its ``peak`` learning rate."""

    @abstractmethod
    def draw(self, generator: torch.Generator) -> list[tuple[Tensor, ...]]:
        """What is drawn for each micro-batch of a step: noise levels [B] first."""

    @abstractmethod
    def loss(self, stage: str, drawn: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, dict]:
        """The loss of one micro-batch, and its terms."""

    def once_a_step(self, stage: str, sigmas: Tensor) -> Tensor | None:
        """A loss over the noise levels of all micro-batches of a step together."""
        return None

    def settings(self) -> dict:
        """Further settings, beside the configuration's, that a run must be resumed with."""
        return {}

    def logged(self, stage: str) -> dict[str, float]:
        """Further numbers for the history."""
        return {}

    def attach(self, state: hooks.SelectionState) -> None:
        """Put the hooks on the transformer."""
        self.state = state
        if self.config.sharding == "fsdp":
            shard(self.transformer, state.adapter.blocks(self.transformer))
        hooks.attach(self.transformer, state)

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
        if self.adapters_from is not None:
            adapter_weights.load(self.transformer, self.adapters_from)
        multiply_merged(self.transformer, adapter_weights.NAME)

    def _adapter_weights(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.transformer.named_parameters() if p.requires_grad}

    def call(self, sigma: Tensor, generator: torch.Generator) -> Call:
        """Samples at noise levels sigma [B]. Drawn on the CPU, so that a seed means the same on every device."""
        batch = self.next_batch(len(sigma), generator)
        noise = torch.randn(batch.latents.shape, generator=generator).to(self.device)
        latents, sigma = batch.latents.to(self.device), sigma.to(self.device)
        conditions = {name: value.to(self.device) for name, value in batch.conditions.items()}
        noisy = self.objective.noisy(latents, noise, sigma)
        wanted = self.objective.target(latents, noise, sigma)
        timestep = self.objective.timestep(sigma)
        inputs = self.recipe.inputs(self.transformer, noisy, timestep, conditions)
        if not self.config.guidance:
            return Call(noisy, wanted, inputs)
        if batch.empty is None:
            raise ValueError(
                f"{type(self).__name__}: guidance is {self.config.guidance:g}, but next_batch gave no conditions of "
                "the empty prompt; wanted them as Batch.empty"
            )
        B = len(sigma)
        empty = {name: value.to(self.device).expand(B, *value.shape[1:]) for name, value in batch.empty.items()}
        return Call(noisy, wanted, inputs, self.recipe.inputs(self.transformer, noisy, timestep, empty))

    def autocast(self) -> torch.autocast:
        """What teacher and student run in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def run_teacher(self, call: Call) -> Teacher:
        """The dense model's run; its output is guided where that is distilled."""
        teacher = run_teacher(self.transformer, self.state, **call.inputs)
        if call.empty is None:
            return teacher
        empty, C = run_teacher(self.transformer, self.state, **call.empty).output, call.noisy.shape[1]
        # Behind the prediction some models give a variance, which no pipeline guides.
        guided = torch.lerp(empty[:, :C], teacher.output[:, :C], self.config.guidance)
        return replace(teacher, output=torch.cat([guided, teacher.output[:, C:]], dim=1))

    def diffusion_error(self, output: Tensor, call: Call) -> Tensor:
        """The model's own loss."""
        return F.mse_loss(self.recipe.prediction(output, call.noisy).float(), call.wanted)

    def distilled(
        self, output: Tensor, call: Call, outputs: dict[int, Tensor], teacher: Teacher
    ) -> tuple[Tensor, dict]:
        """The weighted sum of all terms of a student's pass, and each of them.

        Args:
            output: of the student.
            call: what it was called with.
            outputs: its image tokens [B,N,D] after each hooked block.
            teacher: the dense model's run on the same inputs.
        """
        config = self.config
        layers = [
            layer
            for layer in self.layers
            if layer in outputs and outputs[layer].shape == teacher.tokens[layer][1].shape
        ]
        terms = {
            "diffusion": self.diffusion_error(output, call),
            "output": F.mse_loss(output.float(), teacher.output.float()),
            "features": distillation_loss(
                [outputs[layer] for layer in layers], [teacher.tokens[layer][1] for layer in layers]
            ),
        }
        total = (
            (0.0 if config.guidance else config.diffusion_weight) * terms["diffusion"]
            + config.output_weight * terms["output"]
            + config.feature_weight * terms["features"]
        )
        return total, {name: value.detach() for name, value in terms.items()}

    def _backward(self, stage: str, step: int) -> dict[str, float] | None:
        """Gradients of one step and its mean terms over all processes; None if they are not finite."""
        config, micro = self.config, self.config.micro_batches
        generator = torch.Generator().manual_seed(derive_seed(config.seed, stage, step))
        drawn = self.draw(generator)
        share = micro // world()
        finite, records = True, []
        whole = self.once_a_step(stage, torch.cat([sigma for sigma, *_ in drawn]))
        if whole is not None:
            whole.backward()
        for part in range(rank() * share, (rank() + 1) * share):
            seed = derive_seed(config.seed, stage, step, part)
            torch.manual_seed(seed)  # of the noise on scores and ratios, which checkpointing must be able to repeat
            loss, record = self.loss(stage, drawn[part], torch.Generator().manual_seed(seed))
            if loss.requires_grad:  # without adapters, a call that uses no weight of the method has none to teach
                (loss / share).backward()
            finite = finite and bool(torch.isfinite(loss))
            records.append({name: float(value) for name, value in record.items()})
        # Every process learns whether all are well before any of them steps.
        if average(torch.tensor(float(finite)), self.device).item() < 1:
            return None
        names = list(records[0])
        sums = average(torch.tensor([[r[name] for name in names] for r in records]).mean(dim=0), self.device)
        return dict(zip(names, sums.tolist(), strict=True))

    def before_step(self, stage: str, step: int, progress: float) -> None:  # noqa: B027
        """A step of a stage begins; ``progress`` is the share of all stages' steps that are done."""

    def after_update(self) -> None:  # noqa: B027
        """The weights were just changed."""

    def carried(self) -> Tensor | None:
        """A tensor that a step changes and that a skipped one must not have changed."""
        return None

    def run_stage(
        self,
        stage: str,
        steps: int,
        start: int = 0,
        optimizer_state: dict[str, Tensor] | None = None,
        checkpoints: Path | None = None,
    ) -> None:
        """Train one of :attr:`stages` up to a number of steps.

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
        groups = self.groups(stage)
        if stage == "joint" and self.lora is not None:
            groups.append(dict(params=list(self._adapter_weights().values()), peak=config.lr_adapter))
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), weight_decay=0.01)
        if optimizer_state:
            checkpoint.unflatten(optimizer, optimizer_state)
        warmup = min(config.warmup, steps // 4)
        before, total = config.steps_before(stage), config.steps_before("end")
        self.display.stage(stage, start, steps, config.batch_size)
        for step in range(start, steps):
            fall = config.lr_end + (1 - config.lr_end) * (steps - step) / max(1.0, config.decay * steps)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * min(1.0, (step + 1) / max(1, warmup), fall)
            self.before_step(stage, step, (before + step) / total)
            optimizer.zero_grad(set_to_none=True)
            carried = self.carried()
            held = None if carried is None else carried.clone()
            record = self._backward(stage, step)
            if record is not None:
                params = [p for group in optimizer.param_groups for p in group["params"]]
                gather_gradients(params)
                norms = [nn.utils.clip_grad_norm_(group["params"], 1.0) for group in optimizer.param_groups]
                if not all(math.isfinite(norm) for norm in norms):
                    record = None
            if record is None:
                if carried is not None:
                    carried.copy_(held)
                self._skip(stage, step)
            else:
                self.bad_steps = 0
                optimizer.step()
                self.after_update()
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
                f"{type(self).__name__}: {text}, nor had the {self.bad_steps - 1} before it; start a new run with "
                "lower learning rates (the last checkpoint is whole, but would come by the same steps again)"
            )
        self.display.warn(f"{text}: skipped ({self.bad_steps} in a row, stops after {self.config.max_bad_steps})")

    def _log(self, stage: str, step: int) -> None:
        if not self.recent:
            return
        mean = {k: sum(r[k] for r in self.recent) / len(self.recent) for k in self.recent[0]} | self.logged(stage)
        self.history.append({"stage": stage, "step": step, **{k: round(v, 5) for k, v in mean.items()}})
        self.recent = []
        self.display.log(self.history[-1])

    def save(self, folder: Path, stage: str, step: int, done: int, optimizer: torch.optim.Optimizer) -> Path:
        """Write a checkpoint of everything that the rest of the run depends on; ``done`` counts steps of all stages."""
        tensors = {f"optimizer.{key}": value for key, value in checkpoint.flatten(optimizer).items()}
        tensors |= {f"adapter.{name}": p for name, p in self._adapter_weights().items()}
        for name, part in self.parts().items():
            tensors |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
        record = dict(
            stage=stage,
            stage_step=step,
            config=asdict(self.config),
            settings=self.settings(),
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
        before = asdict(TrainConfig()) | record["config"]  # a setting that is newer than the run had its default
        before |= record.get("settings", {})
        wanted |= json.loads(json.dumps(self.settings()))  # tuples become lists there
        other = [f"{k} {before.get(k)} (now {v})" for k, v in wanted.items() if before.get(k) != v]
        if other:
            raise ValueError(
                f"shiva_ext: the run in {folder} was started with other settings: {', '.join(other)}; resume with the "
                "same ones, or start a new run in another folder"
            )

        def values(prefix: str) -> dict[str, Tensor]:
            return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

        for name, part in self.parts().items():
            part.load_state_dict(values(f"{name}."))
        weights = values("adapter.")
        if weights:
            self.add_adapters()
            with torch.no_grad():
                for name, p in self._adapter_weights().items():
                    p.copy_(weights[name])
        self.history, self.recent = record["history"], record["recent"]
        self.bad_steps = record["bad_steps"]
        return record["stage"], record["stage_step"], values("optimizer.")

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
        at, start, optimizer = found or (self.stages[0], 0, None)
        started = time.monotonic()
        for stage in self.stages[self.stages.index(at) :]:
            self.run_stage(stage, getattr(self.config, f"{stage}_steps"), start, optimizer, folder)
            start, optimizer = 0, None
        if self.history:
            self.history[-1]["seconds"] = round(time.monotonic() - started)
        self.display.close()

    def export_adapter(self, folder: Path) -> Path | None:
        """Write the adapters as a PEFT folder in ``folder``; None if there are none."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.lora is None:
            return None
        adapter = folder / ADAPTER_NAME
        adapter.mkdir(exist_ok=True)
        weights = get_peft_model_state_dict(self.transformer, adapter_name=adapter_weights.NAME)
        weights = {k: v.detach().to(torch.bfloat16).contiguous() for k, v in weights.items()}
        save_file(weights, adapter / "adapter_model.safetensors.tmp")
        os.replace(adapter / "adapter_model.safetensors.tmp", adapter / "adapter_model.safetensors")
        self.lora.inference_mode = True
        self.lora.save_pretrained(str(adapter))
        return adapter
