"""The path, its targets and its loss against the paper's closed forms."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from shiva_ext.caf import flow

from .networks import draw

SHAPE = (5, 2, 4, 4)
X0, X1 = (draw(*SHAPE, seed=seed, dtype=torch.float64) for seed in (1, 2))
T = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
WIDE = T.view(-1, 1, 1, 1)


@pytest.mark.parametrize("h", [0.5, 1.0, 1.5, 2.0])
def test_the_path_is_that_of_constant_acceleration(h):
    """Eq. 7 against x0 + v0 t + a t^2 / 2, eq. 4."""
    v0 = flow.initial_velocity(X0, X1, h)
    a = flow.acceleration_target(X0, X1, v0)
    torch.testing.assert_close(flow.interpolate(X0, X1, v0, T), X0 + v0 * WIDE + a * WIDE**2 / 2, rtol=0, atol=1e-12)


def test_the_path_goes_from_noise_to_data_whatever_the_velocity():
    x = flow.interpolate(X0, X1, 7 * draw(*SHAPE, seed=3, dtype=torch.float64), T)
    torch.testing.assert_close(x[0], X0[0], rtol=0, atol=1e-14)
    torch.testing.assert_close(x[-1], X1[-1], rtol=0, atol=1e-14)


def test_constant_velocity_needs_no_acceleration():
    v0 = flow.initial_velocity(X0, X1, 1.0)
    assert not flow.acceleration_target(X0, X1, v0).any()
    torch.testing.assert_close(flow.interpolate(X0, X1, v0, T), (1 - WIDE) * X0 + WIDE * X1, rtol=0, atol=1e-14)


@pytest.mark.parametrize("h", [0.5, 1.0, 1.5, 2.0])
def test_both_predictions_of_the_data_are_exact(h):
    v0 = flow.initial_velocity(X0, X1, h)
    x = flow.interpolate(X0, X1, v0, T)
    torch.testing.assert_close(flow.predict_data_from_velocity(x, v0, T, h), X1, rtol=0, atol=1e-12)
    found = flow.predict_data(x, v0, flow.acceleration_target(X0, X1, v0), T)
    torch.testing.assert_close(found, X1, rtol=0, atol=1e-12)


def test_any_estimate_of_the_velocity_still_leads_to_the_data():
    """The acceleration's target makes good what the velocity has wrong."""
    v0 = draw(*SHAPE, seed=3, dtype=torch.float64)
    x = flow.interpolate(X0, X1, v0, T)
    found = flow.predict_data(x, v0, flow.acceleration_target(X0, X1, v0), T)
    torch.testing.assert_close(found, X1, rtol=0, atol=1e-12)


def test_the_huber_loss_is_the_published_one():
    p, y = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    y[0, 0, 0, 0] = 3.0
    c = 0.00054 * 4
    assert flow.huber_loss(p, y).item() == pytest.approx((math.sqrt(9 + c**2) - c) / 4 / 2, rel=1e-6)
    assert flow.huber_loss(y, y) == 0


def test_the_huber_loss_has_a_gradient_where_nothing_is_wrong():
    p = torch.zeros(1, 1, 2, 2, requires_grad=True)
    flow.huber_loss(p, torch.zeros(1, 1, 2, 2)).backward()
    assert torch.isfinite(p.grad).all()


def test_losses_are_computed_in_float32():
    p, y = draw(3, 64, seed=1).bfloat16(), draw(3, 64, seed=2)
    for loss in flow.LOSSES.values():
        assert loss(p, y).dtype == torch.float32
        torch.testing.assert_close(loss(p, y), loss(p.float(), y))
    torch.testing.assert_close(flow.l2_loss(p, y), torch.nn.functional.mse_loss(p.float(), y))


def test_times_and_velocities_are_those_of_diffusers():
    """An Euler step of diffusers from t to t' is x + (t' - t) dx/dt in the paper's convention."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    t = torch.tensor([0.0, 0.25, 0.5, 0.75])
    torch.testing.assert_close(flow.timestep(t, h=1), scheduler.timesteps)
    x, rate = draw(2, 2, 4, 4, seed=1), draw(2, 2, 4, 4, seed=2)
    stepped = scheduler.step(flow.from_diffusers_velocity(rate), scheduler.timesteps[0], x).prev_sample
    torch.testing.assert_close(stepped, x + 0.25 * rate)


def test_the_straight_path_of_diffusers_is_that_of_constant_velocity():
    """Noise level sigma = 1 - t: (1 - sigma) data + sigma noise."""
    v0 = flow.initial_velocity(X0, X1, 1.0)
    sigma = (flow.timestep(T, h=1) / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(flow.interpolate(X0, X1, v0, T), (1 - sigma) * X1 + sigma * X0)
    torch.testing.assert_close(flow.from_diffusers_velocity(X0 - X1), v0)


@pytest.mark.parametrize("h", [0.5, 1.0, 1.5, 2.0])
def test_the_timestep_tells_how_much_noise_is_in_a_sample(h):
    """As diffusers' flow matching has it: x = sigma noise + (1 - sigma) data at the timestep 1000 sigma."""
    sigma = (flow.timestep(T, h) / 1000).view(-1, 1, 1, 1)
    x = flow.interpolate(X0, X1, flow.initial_velocity(X0, X1, h), T)
    torch.testing.assert_close(x, sigma * X0 + (1 - sigma) * X1, rtol=0, atol=1e-12)
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert (flow.noise_level(t, h).diff() < 0).all()


def test_straightness_is_0_along_the_chord_and_4_against_it():
    found = flow.straightness(X0, X1, 3 * (X1 - X0))
    assert found.shape == (5,) and found.abs().max() < 1e-12
    torch.testing.assert_close(flow.straightness(X0, X1, X0 - X1), torch.full((5,), 4.0, dtype=torch.float64))
    assert (flow.straightness(X0, X1, draw(*SHAPE, seed=8)) - 2).abs().max() < 1.5


def test_shapes_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match=r"one shape, got x0 \[5, 2, 4, 4\], x1 \[4, 2, 4, 4\]"):
        flow.initial_velocity(X0, X1[:4], 1.5)
    with pytest.raises(ValueError, match=r"t must be \[5\], one time a sample, got \[4\]"):
        flow.interpolate(X0, X1, X0, T[:4])
    with pytest.raises(ValueError, match="at least one sample"):
        flow.huber_loss(X0[:0], X1[:0])
    with pytest.raises(ValueError, match="h is 0"):
        flow.predict_data_from_velocity(X0, X1, T, 0)


def test_no_samples_are_a_path_of_none():
    assert flow.interpolate(X0[:0], X1[:0], X0[:0], T[:0]).shape == (0, 2, 4, 4)
