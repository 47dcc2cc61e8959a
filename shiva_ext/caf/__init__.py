"""Constant Acceleration Flow (CAF, arXiv 2411.00322): a diffusion model distilled into few steps along a path with an
initial velocity and a constant acceleration."""

from .flow import (
    acceleration_target,
    huber_loss,
    initial_velocity,
    interpolate,
    predict_data,
    predict_data_from_velocity,
    straightness,
)
from .model import initial_acceleration_model, initial_velocity_model, predict, scale_output, widen_input
from .pairs import Pairs, make_pairs
from .pipeline import CAFInversion, CAFPipeline
from .scheduler import CAFScheduler
from .train import CAFConfig, train_caf, train_rectified_flow

__all__ = [
    "CAFConfig",
    "CAFInversion",
    "CAFPipeline",
    "CAFScheduler",
    "Pairs",
    "acceleration_target",
    "huber_loss",
    "initial_acceleration_model",
    "initial_velocity",
    "initial_velocity_model",
    "interpolate",
    "make_pairs",
    "predict",
    "predict_data",
    "predict_data_from_velocity",
    "scale_output",
    "straightness",
    "train_caf",
    "train_rectified_flow",
    "widen_input",
]
