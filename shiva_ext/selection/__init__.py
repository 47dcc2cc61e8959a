"""Which tokens are processed, and how many: router, ratio policy, estimators, and baselines to compare with."""

from .baselines import LargestNormSelector, RandomSelector
from .budget import default_tile, solve_budget
from .estimator import (
    ESTIMATORS,
    CounterfactualEstimator,
    Estimator,
    ResidualEstimator,
    anneal,
    get_estimator,
    inclusion,
    perturb,
)
from .policy import BudgetLoss, PolicyConfig, RatioPolicy
from .router import RouterConfig, ShivaRouter
from .table import RatioTable

__all__ = [
    "ESTIMATORS",
    "BudgetLoss",
    "CounterfactualEstimator",
    "Estimator",
    "LargestNormSelector",
    "PolicyConfig",
    "RandomSelector",
    "RatioPolicy",
    "RatioTable",
    "ResidualEstimator",
    "RouterConfig",
    "ShivaRouter",
    "anneal",
    "default_tile",
    "get_estimator",
    "inclusion",
    "perturb",
    "solve_budget",
]
