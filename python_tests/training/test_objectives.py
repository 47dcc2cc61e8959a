"""Training examples against diffusers' own schedulers."""

from itertools import pairwise

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from shiva_ext.training.objectives import Denoising, FlowMatching, objective_for

SIGMA = torch.tensor([0.05, 0.4, 0.999])


def draw(*shape):
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 2, 8, 8), (16, 8)])
def test_flow_matching_goes_straight_from_data_to_noise(shape):
    latents, noise, flow = draw(*shape), draw(*shape) + 1, FlowMatching()
    scheduler = FlowMatchEulerDiscreteScheduler()
    timestep = flow.timestep(SIGMA)
    scheduler.timesteps, scheduler.sigmas = timestep, SIGMA
    torch.testing.assert_close(flow.noisy(latents, noise, SIGMA), scheduler.scale_noise(latents, timestep, noise))
    step = 1e-3
    slope = (flow.noisy(latents, noise, SIGMA) - flow.noisy(latents, noise, SIGMA - step)) / step
    torch.testing.assert_close(flow.target(latents, noise, SIGMA), slope, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_denoising_is_the_schedulers_own(prediction):
    scheduler = DDPMScheduler(prediction_type=prediction)
    objective = objective_for(scheduler)
    latents, noise = draw(4, 8, 8), draw(4, 8, 8) + 1
    timestep = objective.timestep(SIGMA)
    assert timestep.tolist() == [50, 400, 999] and timestep.dtype == torch.int64
    torch.testing.assert_close(
        objective.noisy(latents, noise, SIGMA), scheduler.add_noise(latents, noise, timestep), rtol=1e-5, atol=1e-5
    )
    wanted = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, timestep)
    torch.testing.assert_close(objective.target(latents, noise, SIGMA), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "scheduler, kind",
    [
        (FlowMatchEulerDiscreteScheduler(shift=3.0), FlowMatching),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), FlowMatching),
        (DPMSolverMultistepScheduler(), Denoising),
        (DDIMScheduler(), Denoising),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, type) else value.__name__,
)
def test_the_scheduler_decides(scheduler, kind):
    assert type(objective_for(scheduler)) is kind


def test_a_scheduler_that_implies_nothing_known_is_refused():
    with pytest.raises(ValueError, match="EDMEulerScheduler is neither"):
        objective_for(EDMEulerScheduler())
    with pytest.raises(ValueError, match="prediction_type is 'sample', wanted 'epsilon'"):
        objective_for(DDPMScheduler(prediction_type="sample"))


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize(
    "objective",
    [FlowMatching(), objective_for(DDPMScheduler()), objective_for(DDPMScheduler(prediction_type="v_prediction"))],
    ids=["flow", "epsilon", "velocity"],
)
def test_steps_with_the_right_answers_lead_to_the_data(objective, steps):
    latents, noise = draw(4, 8, 8).double(), draw(4, 8, 8).double() + 1
    levels = torch.linspace(1, 0, steps + 1).tolist()
    x = objective.noisy(latents, noise, torch.ones(3))
    for now, after in pairwise(levels):
        sigma = torch.full((3,), now)
        torch.testing.assert_close(x, objective.noisy(latents, noise, sigma), rtol=1e-4, atol=1e-4)
        x = objective.step(x, objective.target(latents, noise, sigma), now, after)
    torch.testing.assert_close(x, latents, rtol=1e-4, atol=1e-4)


def test_a_step_is_ddims():
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    x, output = draw(4, 8, 8), draw(4, 8, 8) * 0.5
    wanted = scheduler.step(output, 599, x, eta=0).prev_sample
    got = objective_for(scheduler).step(x, output, 0.5995, 0.4995)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
