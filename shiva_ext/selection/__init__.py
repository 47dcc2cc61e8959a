"""Which tokens are processed, and how many: router, ratio policy, estimators, and baselines to compare with."""

from .baselines import LargestNormSelector, RandomSelector
from .budget import default_tile, solve_budget
from .estimator import CounterfactualEstimator, Estimator, ResidualEstimator, anneal, inclusion, perturb
from .policy import BudgetLoss, PolicyConfig, RatioPolicy
from .registry import ESTIMATORS, get_estimator
from .relaxed import (
    CounterfactualTopKEstimator,
    NoiseEstimator,
    RelaxedEstimator,
    SoftSortEstimator,
    StraightThroughEstimator,
)
from .router import RouterConfig, ShivaRouter
from .table import RatioTable

__all__ = [
    "ESTIMATORS",
    "BudgetLoss",
    "CounterfactualEstimator",
    "CounterfactualTopKEstimator",
    "Estimator",
    "LargestNormSelector",
    "NoiseEstimator",
    "PolicyConfig",
    "RandomSelector",
    "RatioPolicy",
    "RatioTable",
    "RelaxedEstimator",
    "ResidualEstimator",
    "RouterConfig",
    "ShivaRouter",
    "SoftSortEstimator",
    "StraightThroughEstimator",
    "anneal",
    "default_tile",
    "get_estimator",
    "inclusion",
    "perturb",
    "solve_budget",
]
