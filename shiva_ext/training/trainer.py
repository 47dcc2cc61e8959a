"""The three stages of Shiva-DiT training (arXiv 2602.05605, section 3.5)."""

import json
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
from tqdm import tqdm

from shiva_ext import adapter_weights, hooks
from shiva_ext.artifact import ADAPTER_NAME, ShivaArtifact
from shiva_ext.models import adapter_for
from shiva_ext.selection import BudgetLoss, RatioPolicy, RatioTable, ShivaRouter, get_estimator

from .config import ADAPTER_TARGETS, TrainConfig
from .losses import distillation_loss, distilled_layers
from .merged_adapters import multiply_merged
from .sampling import shared_ratios, stratified_ratios, stratified_timesteps
from .stages import run_student, run_teacher


class Batch(NamedTuple):
    """Training samples: latents [B,C,H,W], prompt_embeds [B,T,J], pooled [B,P]."""

    latents: Tensor
    prompt_embeds: Tensor
    pooled: Tensor


STAGES = ("router", "policy", "joint")


class ShivaTrainer:
    """Trains router, policy and adapters of one transformer by flow matching and distillation.

    Args:
        transformer: the dense model; its own weights stay frozen and are the teacher's.
        config: see :class:`TrainConfig`.
        next_batch: gives the next ``n`` samples, prompts already dropped out: ``next_batch(n, generator) -> Batch``.
        router, policy: start from these instead of fresh ones.
        dense: train only the adapters, without pruning: the control experiment.
    """

    def __init__(
        self,
        transformer: nn.Module,
        config: TrainConfig,
        next_batch: Callable[[int, torch.Generator], Batch],
        router: ShivaRouter | None = None,
        policy: RatioPolicy | None = None,
        dense: bool = False,
    ):
        self.transformer, self.config, self.next_batch, self.dense = transformer, config, next_batch, dense
        torch.manual_seed(config.seed)
        self.generator = torch.Generator().manual_seed(config.seed)
        transformer.requires_grad_(False).eval()
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
        self.state = hooks.SelectionState(self.artifact, adapter)
        self.layers = distilled_layers(self.num_layers, config.feature_every)
        self.lora: LoraConfig | None = None
        self.history: list[dict] = []
        hooks.attach(transformer, self.state)

    def close(self) -> None:
        """Leave the transformer as it was found."""
        hooks.detach(self.transformer)
        if self.lora is not None:
            adapter_weights.remove(self.transformer)

    def add_adapters(self) -> None:
        """Inject trainable DoRA adapters into all attention and MLP linears of the blocks."""
        rank = self.config.adapter_rank
        self.lora = LoraConfig(r=rank, lora_alpha=rank, use_dora=True, target_modules=ADAPTER_TARGETS, lora_dropout=0.0)
        adapter_weights.inject(self.transformer, self.lora)
        multiply_merged(self.transformer, adapter_weights.NAME)

    def _groups(self, stage: str) -> list[dict]:
        config = self.config
        groups = []
        if not self.dense:
            groups.append(dict(params=list(self.router.parameters()), lr=config.lr_router))
            if stage != "router":
                groups.append(dict(params=list(self.policy.parameters()), lr=config.lr_policy))
        if stage == "joint" and self.lora is not None:
            params = [p for p in self.transformer.parameters() if p.requires_grad]
            groups.append(dict(params=params, lr=config.lr_adapter))
        return groups

    def _ratios(self, stage: str, sigma: Tensor, warm: Tensor) -> Tensor:
        """This call's ratios [L]."""
        if stage == "router":
            ratios = torch.full((self.num_layers,), float(warm), device=self.device)
            ratios[: self.artifact.first_layer] = 1
            return ratios
        exploring = self.config.policy_noise if stage == "policy" else 0.0
        return shared_ratios(self.policy(sigma, noise=exploring, generator=self.generator))

    def budget_term(self, sigmas: Tensor) -> Tensor:
        """The budget loss of one step, over the noise levels [batch_size] of all its micro-batches.

        Once a step, not once a micro-batch: those lie at rising noise levels, and a moving average over them would
        remember the last ones best. Without exploration noise, which pulls the mean ratio towards one half.
        """
        return self.budget_loss(self.policy(sigmas.to(self.device)))

    def loss(self, stage: str, sigma: Tensor, warm: Tensor) -> tuple[Tensor, dict]:
        """The loss of one micro-batch with noise levels sigma [B], less the budget's, and its terms."""
        config = self.config
        # Drawn on the CPU, so that a seed means the same on every device.
        batch = Batch(*(t.to(self.device) for t in self.next_batch(len(sigma), self.generator)))
        noise = torch.randn(batch.latents.shape, generator=self.generator).to(self.device)
        sigma = sigma.to(self.device)
        level = sigma.view(-1, 1, 1, 1)
        inputs = dict(
            hidden_states=(1 - level) * batch.latents + level * noise,
            encoder_hidden_states=batch.prompt_embeds,
            pooled_projections=batch.pooled,
            timestep=sigma * 1000,
        )
        with torch.autocast(self.device.type, torch.bfloat16):
            if self.dense:
                self.state.active = False
                output = self.transformer(**inputs, return_dict=False)[0].float()
                terms = {"diffusion": F.mse_loss(output, noise - batch.latents)}
                return terms["diffusion"], {k: v.item() for k, v in terms.items()}
            teacher = run_teacher(self.transformer, self.state, **inputs)
            ratios = self._ratios(stage, sigma, warm)
            output, student = run_student(self.transformer, self.state, self.estimator, ratios, teacher, **inputs)
        output = output.float()
        features = [layer for layer in self.layers if layer in student.outputs]
        terms = {
            "diffusion": F.mse_loss(output, noise - batch.latents),
            "output": F.mse_loss(output, teacher.output.float()),
            "features": distillation_loss(
                [student.outputs[layer] for layer in features], [teacher.tokens[layer][1] for layer in features]
            ),
        }
        total = (
            config.diffusion_weight * terms["diffusion"]
            + config.output_weight * terms["output"]
            + config.feature_weight * terms["features"]
        )
        record = {k: v.item() for k, v in terms.items()}
        record["ratio"] = float(ratios.detach()[self.artifact.first_layer :].mean())
        return total, record

    def run_stage(self, stage: str, steps: int, log_every: int = 25) -> None:
        """Train one of :data:`STAGES` for a number of steps."""
        config = self.config
        if steps == 0:
            return
        if stage == "joint" and config.adapter_rank and self.lora is None:
            self.add_adapters()
        optimizer = torch.optim.AdamW(self._groups(stage), betas=(0.9, 0.99), weight_decay=0.01)
        warmup = min(config.warmup, steps // 4)

        def factor(step: int) -> float:
            fall = config.lr_end + (1 - config.lr_end) * (steps - step) / max(1.0, config.decay * steps)
            return min(1.0, (step + 1) / max(1, warmup), fall)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        total = config.router_steps + config.policy_steps + config.joint_steps
        done = {"router": 0, "policy": config.router_steps, "joint": config.router_steps + config.policy_steps}[stage]
        recent: list[dict] = []
        started = time.monotonic()
        for step in tqdm(range(steps), desc=f"{stage} stage", mininterval=5):
            self.estimator.progress = (done + step) / total
            micro = config.micro_batches
            warm = stratified_ratios(micro, config.ratio_min, config.ratio_max, self.generator)
            sigmas = [stratified_timesteps(config.batch_size // micro, i, micro, self.generator) for i in range(micro)]
            optimizer.zero_grad(set_to_none=True)
            if stage != "router" and not self.dense:
                self.budget_term(torch.cat(sigmas)).backward()
            for part, sigma in enumerate(sigmas):
                loss, record = self.loss(stage, sigma, warm[part])
                if not math.isfinite(loss.item()):
                    raise FloatingPointError(
                        f"ShivaTrainer: the loss is {loss.item()} in step {step} of the {stage} stage ({record}); "
                        "lower the learning rates"
                    )
                (loss / micro).backward()
                recent.append(record)
            for group in optimizer.param_groups:
                nn.utils.clip_grad_norm_(group["params"], 1.0)
            optimizer.step()
            schedule.step()
            if (step + 1) % log_every == 0 or step + 1 == steps:
                mean = {k: sum(r[k] for r in recent) / len(recent) for k in recent[0]}
                self.history.append({"stage": stage, "step": step + 1, **{k: round(v, 5) for k, v in mean.items()}})
                recent = []
                tqdm.write(json.dumps(self.history[-1]))
        self.history[-1]["seconds"] = round(time.monotonic() - started)
        for p in params:
            p.grad = None

    def export(self, folder: str | os.PathLike) -> ShivaArtifact:
        """Write the artefact: router, policy, its table solved for the budget, and the adapters."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config
        if self.dense:
            table = RatioTable.fixed(1.0, self.num_layers)
        else:
            levels = [(i + 1) / config.table_levels for i in range(config.table_levels)]
            table = RatioTable.from_policy(self.policy, levels).with_budget(
                config.budget,
                self.state.adapter.num_tokens(self.transformer),
                together=self.router.group_sizes() if config.share_selection else None,
            )
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
        artifact = replace(self.artifact, table=table, adapter=adapter, metadata=metadata)
        artifact.save(folder)
        return artifact
