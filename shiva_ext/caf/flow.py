"""The path of CAF (arXiv 2411.00322), its two targets, and its loss, as functions of tensors.

Time is the paper's: t = 0 is noise x0, t = 1 is data x1. Diffusers' flow matching counts noise: a sample is
sigma noise + (1 - sigma) data, its timestep 1000 sigma, and a model's velocity dx/dsigma = noise - data. On a path of
constant velocity sigma = 1 - t, and that velocity is -dx/dt; on one with acceleration see :func:`noise_level`.

Samples x are floating [B, ...], times t floating [B]; all results have the dtype that torch's promotion gives.
"""

import torch
from torch import Tensor

TIMESTEPS = 1000  # a transformer's timestep at t = 0
HUBER = 0.00054  # c of the Huber loss, as a share of the number of values in a sample


def noise_level(t: Tensor, h: float) -> Tensor:
    """The share sigma of noise in x_t = sigma x0 + (1 - sigma) x1 on the path with v0 = h (x1 - x0).

    Eq. 7 with eq. 8 put in gives sigma = 1 - t^2 - h (t - t^2), which is 1 - t for h = 1 alone.

    Args:
        t: times of any shape.
        h: above 0 and at most 2; it falls all the way from 1 to 0 then.
    """
    return 1 - t.square() - h * (t - t.square())


def timestep(t: Tensor, h: float) -> Tensor:
    """What a diffusers transformer is told of times t: 1000 times the noise level there.

    The paper tells its networks t. A transformer that was trained by flow matching has learned what timestep goes with
    how much noise; told 1000 (1 - t), it would be wrong about every sample between the ends if h is not 1.
    """
    return TIMESTEPS * noise_level(t, h)


def from_diffusers_velocity(velocity: Tensor) -> Tensor:
    """dx/dt of a constant-velocity model's output dx/dsigma, and the other way round: the two differ in sign."""
    return -velocity


def _beside(t: Tensor, x: Tensor) -> Tensor:
    """t [B] with axes to multiply x [B, ...]."""
    if t.ndim != 1 or len(t) != len(x):
        raise ValueError(f"caf.flow: t must be [{len(x)}], one time a sample, got {list(t.shape)}")
    return t.to(x.device).view(-1, *[1] * (x.ndim - 1))


def _same_shape(**tensors: Tensor) -> None:
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        got = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"caf.flow: samples must have one shape, got {got}")


def initial_velocity(x0: Tensor, x1: Tensor, h: float) -> Tensor:
    """The target of the velocity network, v0 = h (x1 - x0). CAF (arXiv 2411.00322), eq. 8.

    Args:
        x0, x1: noise and data [B, ...].
        h: 1 is constant velocity, below 1 the path speeds up, above 1 it slows down; the paper's is 1.5.
    """
    _same_shape(x0=x0, x1=x1)
    return h * (x1 - x0)


def interpolate(x0: Tensor, x1: Tensor, v0: Tensor, t: Tensor) -> Tensor:
    """The path x_t = (1 - t^2) x0 + t^2 x1 + v0 (t - t^2). CAF (arXiv 2411.00322), eq. 7.

    It is x0 + v0 t + a t^2 / 2 with the acceleration of :func:`acceleration_target`, and ends in x1 whatever v0 is.

    Args:
        x0, x1, v0: noise, data and initial velocity [B, ...].
        t: [B] in [0, 1].

    Raises:
        ValueError: shapes that do not belong together.
    """
    _same_shape(x0=x0, x1=x1, v0=v0)
    t = _beside(t, x0)
    return (1 - t.square()) * x0 + t.square() * x1 + v0 * (t - t.square())


def acceleration_target(x0: Tensor, x1: Tensor, v0: Tensor) -> Tensor:
    """The target of the acceleration network, a = 2 (x1 - x0) - 2 v0. CAF (arXiv 2411.00322), eq. 6.

    With the network's own estimate as v0 the acceleration makes good that estimate's error.
    """
    _same_shape(x0=x0, x1=x1, v0=v0)
    return 2 * (x1 - x0) - 2 * v0


def predict_data(x_t: Tensor, v0: Tensor, a: Tensor, t: Tensor) -> Tensor:
    """Where the path through x_t ends: x1 = x_t + v0 (1 - t) + a (1 - t^2) / 2."""
    _same_shape(x_t=x_t, v0=v0, a=a)
    t = _beside(t, x_t)
    return x_t + v0 * (1 - t) + a * (1 - t.square()) / 2


def predict_data_from_velocity(x_t: Tensor, v0: Tensor, t: Tensor, h: float) -> Tensor:
    """Where the path of v0 = h (x1 - x0) through x_t ends: x1 = x_t + (1 - t^2 - h (t - t^2)) v0 / h.

    The published code takes x_t + (1 - t) v0 / h, which is the same for h = 1 alone: for another h it misses x1 by
    (h - 1) (t - t^2) v0 / h even if v0 is exact.
    """
    _same_shape(x_t=x_t, v0=v0)
    if h == 0:
        raise ValueError("caf.flow: h is 0, wanted another number: a path without initial velocity says nothing of x1")
    t = _beside(t, x_t)
    return x_t + (1 - t.square() - h * (t - t.square())) * v0 / h


def huber_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Pseudo-Huber distance of whole samples, (sqrt(|p - y|^2 + c^2) - c) / D with c = 0.00054 D, mean over the batch.

    D is the number of values in a sample. As in the published code of CAF (arXiv 2411.00322), without its second term,
    the LPIPS of the two x1.

    Args:
        prediction, target: [B, ...], B >= 1; computed in float32, or float64 if they are.

    Returns:
        a scalar.

    Raises:
        ValueError: shapes differ, or there are no samples.
    """
    squares, D = _squared_distances(prediction, target)
    c = HUBER * D
    return (((squares + c**2).sqrt() - c) / D).mean()


def l2_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference, as in the paper's 2-D experiments; arguments as :func:`huber_loss`."""
    squares, D = _squared_distances(prediction, target)
    return (squares / D).mean()


LOSSES = {"huber": huber_loss, "l2": l2_loss}


def _squared_distances(prediction: Tensor, target: Tensor) -> tuple[Tensor, int]:
    """Of each sample, [B], and the number of values in one."""
    _same_shape(prediction=prediction, target=target)
    if not prediction.numel():
        raise ValueError(f"caf.flow: a loss needs at least one sample, got shape {list(prediction.shape)}")
    wide = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    difference = (prediction.to(wide) - target.to(wide)).flatten(1)
    return difference.square().sum(1), difference.shape[1]


def straightness(x0: Tensor, x1: Tensor, derivative: Tensor) -> Tensor:
    """Normalised flow straightness of each sample: |(x1 - x0) / |x1 - x0| - x' / |x'||^2, CAF (arXiv 2411.00322).

    Its mean over samples and times is NFSS; 0 is a straight path, 4 one that goes the wrong way.

    Args:
        x0, x1: ends of the paths, [B, ...].
        derivative: dx/dt at some time, [B, ...]; v0 + a t for CAF.

    Returns:
        float64 [B].
    """
    _same_shape(x0=x0, x1=x1, derivative=derivative)
    chord, tangent = (x1.double() - x0.double()).flatten(1), derivative.double().flatten(1)
    unit = torch.nn.functional.normalize
    return (unit(chord, dim=1) - unit(tangent, dim=1)).square().sum(1)
