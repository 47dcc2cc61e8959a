"""What a cache's settings were fitted to: a model, a scheduler and a number of steps; nothing else may use them."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass

import torch
from torch import nn

PROBED = 16  # values of the model's first and last weight
_NEAR = 0.07  # of these: a model in half precision, or with weights in eight bits, is the same model
# What does not change the noise levels of a run, or is set by the pipeline for each of them.
_OPEN = ("_class_name", "_diffusers_version", "_use_default_values")


@dataclass(frozen=True)
class Fit:
    """Where settings come from.

    Attributes:
        model_class: of the transformer.
        config: a hash of its configuration.
        weights: a few values of its first and last weight.
        scheduler: class and configuration, None where there was none.
        steps: of the runs.
    """

    model_class: str
    config: str
    weights: tuple[float, ...]
    scheduler: dict | None
    steps: int

    @classmethod
    def of(cls, transformer: nn.Module, scheduler, steps: int) -> "Fit":
        """Of a model on its own device, and a scheduler or None."""
        return cls(
            type(transformer).__name__, _config_hash(transformer), _probe(transformer), _schedule(scheduler), steps
        )

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict) -> "Fit":
        return cls(**{**content, "weights": tuple(content["weights"])})

    def check_model(self, transformer: nn.Module) -> None:
        """Raise ValueError for another model than that it was fitted to."""
        name = type(transformer).__name__
        if name != self.model_class:
            raise ValueError(f"shiva_ext: the cache was calibrated for a {self.model_class}, got a {name}")
        if _config_hash(transformer) != self.config:
            raise ValueError(
                f"shiva_ext: the cache was calibrated for a {name} of another configuration; calibrate it for this one"
            )
        found = _probe(transformer)
        if found and self.weights and not all(map(_near, found, self.weights)):
            raise ValueError(
                f"shiva_ext: the cache was calibrated for a {name} with other weights; calibrate it for this checkpoint"
            )

    def check_scheduler(self, scheduler) -> None:
        """Raise ValueError for another scheduler than that it was fitted with."""
        found = _schedule(scheduler)
        if self.scheduler is None or found is None or found == self.scheduler:
            return
        names = sorted({*found, *self.scheduler})
        name = next(name for name in names if found.get(name) != self.scheduler.get(name))
        raise ValueError(
            f"shiva_ext: the cache was calibrated with a scheduler whose {name} is {self.scheduler.get(name)!r}, this "
            f"one's is {found.get(name)!r}; calibrate it with this one"
        )

    def check_steps(self, steps: int) -> None:
        """Raise ValueError for runs of another length."""
        if steps != self.steps:
            raise ValueError(
                f"shiva_ext: the cache was calibrated for runs of {self.steps} steps, got one of {steps}; calibrate it "
                "for those, or make as many"
            )


def _near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=_NEAR, abs_tol=1e-3)


def _config_hash(transformer: nn.Module) -> str:
    config = {k: v for k, v in sorted(dict(transformer.config).items()) if not k.startswith("_")}
    return hashlib.sha256(json.dumps(config, default=str).encode()).hexdigest()[:16]


def _probe(transformer: nn.Module) -> tuple[float, ...]:
    """Values of the first and the last matrix; none where they are elsewhere (offloaded) or not plain."""
    matrices = [p for p in transformer.parameters() if p.ndim > 1]
    if not matrices or any(type(p) is not nn.Parameter or p.is_meta for p in (matrices[0], matrices[-1])):
        return ()
    with torch.no_grad():
        values = [p.flatten()[:PROBED].float().cpu() for p in (matrices[0], matrices[-1])]
    return tuple(round(value, 5) for each in values for value in each.tolist())


def _schedule(scheduler) -> dict | None:
    if scheduler is None:
        return None
    config = {k: v for k, v in dict(scheduler.config).items() if k not in _OPEN and not callable(v)}
    return json.loads(json.dumps({"class": type(scheduler).__name__, **config}, default=str))
