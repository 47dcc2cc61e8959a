"""Which tokens are processed, and how many: router, ratio policy, estimators, and baselines to compare with."""

from .baselines import LargestNormSelector, RandomSelector
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
from .table import RatioTable, solve_budget

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
    "get_estimator",
    "inclusion",
    "perturb",
    "solve_budget",
]
