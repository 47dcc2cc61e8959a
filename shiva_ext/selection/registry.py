"""Estimators by name."""

from collections.abc import Callable
from functools import partial

from .estimator import CounterfactualEstimator, Estimator, ResidualEstimator
from .relaxed import (
    CounterfactualTopKEstimator,
    NoiseEstimator,
    RelaxedEstimator,
    SoftSortEstimator,
    StraightThroughEstimator,
)

ESTIMATORS: dict[str, Callable[..., Estimator]] = {
    "counterfactual": CounterfactualEstimator,
    "counterfactual_top_k": CounterfactualTopKEstimator,
    "residual": ResidualEstimator,
    "residual_flipped": partial(ResidualEstimator, flipped=True),
    "straight_through": StraightThroughEstimator,
    "soft_top_k": RelaxedEstimator,
    "gumbel": partial(RelaxedEstimator, noise="gumbel"),
    "subset": partial(RelaxedEstimator, relaxation="subset", noise="gumbel"),
    "neuralsort": partial(RelaxedEstimator, relaxation="neuralsort", tau=(0.1, 0.01)),
    "neuralsort_stochastic": partial(RelaxedEstimator, relaxation="neuralsort", noise="gumbel", tau=(0.1, 0.01)),
    "neuralsort_soft": partial(SoftSortEstimator, tau=(0.1, 0.01)),
    "tnt": NoiseEstimator,
    "tnt_rescaled": partial(NoiseEstimator, rescaled=True),
}


def get_estimator(name: str = "counterfactual", **options) -> Estimator:
    """An estimator by name, with its constructor's options.

    Raises:
        ValueError: no estimator has this name; the message lists those there are.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"get_estimator: got {name!r}, wanted one of {', '.join(sorted(ESTIMATORS))}")
    return ESTIMATORS[name](**options)
