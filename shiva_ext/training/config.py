"""Every number of a training run, in one place."""

import math
import os
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from shiva_ext.methods import TRAINED
from shiva_ext.selection.allocation import LOWEST

METHODS = ("shiva", *TRAINED)
# All attention and MLP linears of the blocks, of both streams.
ADAPTER_TARGETS = (
    r"(.*\.)?\w*blocks\.\d+\.(.*\.)?"
    r"(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out|net\.0\.proj|net\.2|proj_mlp|proj_out)"
)


@dataclass
class TrainConfig:
    """Settings of the three stages; the defaults are the paper's (Shiva-DiT, arXiv 2602.05605) where it gives one.

    Attributes:
        budget: wanted mean share of tokens in the pruned layers.
        estimator: gradient estimator, see :data:`shiva_ext.selection.ESTIMATORS`.
        router_steps, policy_steps, joint_steps: length of the stages: router alone at stratified ratios, then router
            and policy with exploration noise, then both and the adapters.
        batch_size: samples a step; they are cut into ``micro_batches`` calls, each with one token count a layer.
        ratio_min, ratio_max: range of the first stage's ratios.
        lr_router, lr_policy, lr_adapter: peak learning rates of AdamW.
        warmup: steps of linear warm-up of each stage; the last ``decay`` share of each falls linearly to ``lr_end``
            times the peak.
        diffusion_weight: factor of the model's own loss, the flow-matching error.
        output_weight: factor of the squared difference between the student's and the teacher's output.
        feature_weight: factor of the normalised feature distillation, eq. 31, over every ``feature_every``-th block.
        budget_weight: factor of the budget loss, eq. 13.
        anneal_to: how far the estimator's temperatures get on their way from start to end, in [0, 1]. Short runs may
            do better when they stay warm.
        policy_noise: standard deviation on the logits in the second stage, eq. 29.
        schedule: "policy" learns the ratios by the estimator, as published. "measured" keeps the budget at every moment
            and moves tokens to where the output comes nearest to the teacher's for them, by differences
            (:func:`~.measure.ratio_values`) taken ``schedule_updates`` times in the first three quarters of the joint
            stage; the second stage is left out then.
        schedule_updates, schedule_samples: how often, and samples at each of at most ten noise levels.
        regions: equal intervals of the noise level, of which each micro-batch draws from one. The samples of a
            micro-batch share one count a layer, so few of them blur what a schedule does over time. 0 is one a
            micro-batch of the global batch, as published (eq. 15), or ten for a measured schedule.
        adapter_rank: of the DoRA adapters; alpha equals it. 0 trains none.
        prompt_dropout: share of prompts replaced by the empty one.
        share, hidden: of the router, see :class:`shiva_ext.selection.RouterConfig`.
        first_layer: blocks before it stay dense; the paper keeps the first one. The budget is that of the others.
        share_selection: whether the layers of a router also share what it selects, see
            :class:`shiva_ext.artifact.ShivaArtifact`.
        table_levels: noise levels of the exported look-up table, evenly spread over (0, 1].
        precision: "bf16" runs the model in bfloat16 where that is safe (autocast), "fp32" all of it in float32.
        gradient_checkpointing: compute blocks again in the backward pass instead of keeping what they need.
        sharding: "ddp" keeps the model whole in every process, "fsdp" shares its frozen weights out (FSDP2).
        resolution: side of the square that images are cut to, in pixels.
        log_every: steps between two entries of the history.
        sample_every: steps between two pictures of dense and pruned samples, in ``samples``; 0 for none.
        sample_count: images in one.
        tracker: where the history goes besides: "tensorboard", or another of accelerate's trackers; "" for nowhere.
        checkpoint_every: steps between two checkpoints; each stage's end makes one, too. 0 for the ends alone.
        keep_checkpoints: how many are kept.
        max_bad_steps: steps without a finite gradient that are skipped, one after the other, before the run stops.
        seed: of everything random.
        method: "shiva", or another trained method of :data:`shiva_ext.methods.TRAINED`: "diffcr", "dydit", "sparsedit".
            Those have one stage of ``joint_steps``; their own weights learn at ``lr_router``, and those that set how
            much is kept at ``lr_policy``.
        start_from: folder or hub id of an artefact to go on from, of the same kind of model: its router, policy and
            adapters in place of fresh ones. With ``router_steps`` and ``policy_steps`` 0 only the joint stage follows.
        guidance: above 1 the teacher is the dense model guided at this scale, u + guidance * (c - u), and the student
            learns to give that in one call: its pipeline then runs without guidance (``guidance_scale=1``), in half the
            calls. Needs ``output_weight``; the model's own loss, which knows no guidance, is left out. 0 is off.
    """

    budget: float = 0.6
    estimator: str = "counterfactual"
    router_steps: int = 2000
    policy_steps: int = 2000
    joint_steps: int = 10000
    batch_size: int = 16
    micro_batches: int = 4
    ratio_min: float = 0.3
    ratio_max: float = 0.95
    lr_router: float = 3e-4
    lr_policy: float = 1e-4
    lr_adapter: float = 1e-4
    warmup: int = 200
    decay: float = 0.3
    lr_end: float = 0.05
    diffusion_weight: float = 1.0
    output_weight: float = 0.0
    feature_weight: float = 0.1
    feature_every: int = 4
    budget_weight: float = 1.0
    anneal_to: float = 1.0
    policy_noise: float = 1.0
    schedule: str = "policy"
    schedule_updates: int = 6
    schedule_samples: int = 32
    regions: int = 0
    adapter_rank: int = 32
    prompt_dropout: float = 0.1
    share: int = 2
    hidden: int = 64
    first_layer: int = 1
    share_selection: bool = False
    table_levels: int = 20
    precision: str = "bf16"
    gradient_checkpointing: bool = False
    sharding: str = "ddp"
    resolution: int = 1024
    log_every: int = 25
    sample_every: int = 500
    sample_count: int = 4
    tracker: str = ""
    checkpoint_every: int = 250
    keep_checkpoints: int = 2
    max_bad_steps: int = 10
    seed: int = 0
    method: str = "shiva"
    start_from: str = ""
    guidance: float = 0.0

    def steps_before(self, stage: str) -> int:
        """Steps of the stages before this one ("router", "policy", "joint"); "end" is behind the last."""
        steps = {"router": self.router_steps, "policy": self.policy_steps, "joint": self.joint_steps, "end": 0}
        if self.method != "shiva":
            steps["router"] = steps["policy"] = 0
        if self.schedule == "measured":
            steps["policy"] = 0
        names = list(steps)
        return sum(steps[name] for name in names[: names.index(stage)])

    def __post_init__(self):
        if not 0 < self.budget <= 1:
            raise ValueError(f"TrainConfig: budget is {self.budget}, wanted a share above 0 and at most 1")
        if self.first_layer < 0:
            raise ValueError(f"TrainConfig: first_layer is {self.first_layer}, wanted a number of blocks from 0 on")
        if not 0 <= self.anneal_to <= 1:
            raise ValueError(f"TrainConfig: anneal_to is {self.anneal_to}, wanted a share of the way in [0, 1]")
        if self.regions < 0:
            raise ValueError(f"TrainConfig: regions is {self.regions}, wanted a number of intervals, or 0")
        if self.schedule_updates < 1 or self.schedule_samples < 1:
            raise ValueError(
                f"TrainConfig: schedule_updates is {self.schedule_updates} and schedule_samples "
                f"{self.schedule_samples}, wanted at least 1"
            )
        if self.schedule == "measured" and self.budget < LOWEST:
            raise ValueError(f"TrainConfig: budget is {self.budget}, wanted at least {LOWEST} for a measured schedule")
        choosable = {"precision": ("bf16", "fp32"), "sharding": ("ddp", "fsdp"), "schedule": ("policy", "measured")}
        for name, choices in choosable.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"TrainConfig: {name} is {getattr(self, name)!r}, wanted one of {', '.join(map(repr, choices))}"
                )
        if self.method not in METHODS:
            raise ValueError(f"TrainConfig: method is {self.method!r}, wanted one of {', '.join(METHODS)}")
        if self.guidance and not (self.guidance > 1 and self.output_weight > 0):
            raise ValueError(
                f"TrainConfig: guidance is {self.guidance} and output_weight {self.output_weight}, wanted a scale "
                "above 1 and a weight above 0 (the guided output is what is learned), or guidance 0"
            )
        if self.keep_checkpoints < 1 or self.log_every < 1:
            raise ValueError("TrainConfig: keep_checkpoints and log_every must be at least 1")
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"TrainConfig: batch_size is {self.batch_size}, wanted a multiple of micro_batches "
                f"({self.micro_batches})"
            )


# Settings that another run of the same training may change: they do not touch its result.
FREE = (
    "sharding",
    "log_every",
    "sample_every",
    "sample_count",
    "tracker",
    "checkpoint_every",
    "keep_checkpoints",
    "max_bad_steps",
)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def read_config(path: str | os.PathLike | None = None, **overrides) -> TrainConfig:
    """Settings from a YAML file (``budget: 0.5`` and so on) and, before those, from arguments.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no mapping, or a setting is unknown, of the wrong type or out of range.
    """
    values = {}
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"shiva_ext: there is no settings file {path}")
        try:
            values = yaml.safe_load(Path(path).read_text()) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"shiva_ext: {path} is not YAML ({error})") from error
        if not isinstance(values, dict):
            raise ValueError(f"shiva_ext: {path} holds a {type(values).__name__}, wanted lines such as 'budget: 0.6'")
    values |= overrides
    known = {field.name: type(field.default) for field in fields(TrainConfig)}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"shiva_ext: unknown setting {name!r}; wanted some of {', '.join(known)}")
        wanted = known[name]
        if wanted is float and (type(value) is int or (isinstance(value, str) and _is_number(value))):
            values[name] = float(value)  # YAML takes 1e-4 for text
        elif type(value) is not wanted:
            raise ValueError(
                f"shiva_ext: the setting {name} is {value!r} ({type(value).__name__}), wanted a {wanted.__name__}"
            )
    return TrainConfig(**values)
