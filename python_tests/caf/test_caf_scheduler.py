"""The scheduler's steps: exact on oracles, in both directions, and refusing what is none of its own."""

import pytest
import torch

from shiva_ext.caf import CAFScheduler

from .networks import draw

X0, X1 = (draw(2, 3, 4, 4, seed=seed, dtype=torch.float64) for seed in (1, 2))


def run(N, h=1.5, **config):
    scheduler, v0 = CAFScheduler(h, **config), h * (X1 - X0)
    scheduler.set_timesteps(N)
    x = X0
    for timestep in scheduler.timesteps:
        x = scheduler.step(2 * (X1 - X0) - 2 * v0, timestep, x, v0).prev_sample
    return x


@pytest.mark.parametrize("h", [0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("N", [1, 2, 5])
def test_oracles_lead_from_noise_to_data_and_back(N, h):
    torch.testing.assert_close(run(N, h), X1, rtol=0, atol=1e-6)
    scheduler, v0, x = CAFScheduler(h), h * (X1 - X0), X1
    scheduler.set_timesteps(N, inverse=True)
    for timestep in scheduler.timesteps:
        x = scheduler.invert_step(2 * (X1 - X0) - 2 * v0, timestep, x, v0).prev_sample
    torch.testing.assert_close(x, X0, rtol=0, atol=1e-6)


def test_one_step_is_velocity_and_half_the_acceleration():
    scheduler, v0, a = CAFScheduler(), draw(1, 3, 4, 4, seed=3), draw(1, 3, 4, 4, seed=4)
    scheduler.set_timesteps(1)
    x = draw(1, 3, 4, 4, seed=5)
    torch.testing.assert_close(scheduler.step(a, 1000.0, x, v0, return_dict=False)[0], x + v0 + a / 2)


def test_the_second_of_three_steps_weighs_the_acceleration_with_its_middle():
    scheduler, v0, a = CAFScheduler(), draw(1, 3, 4, 4, seed=3), draw(1, 3, 4, 4, seed=4)
    scheduler.set_timesteps(3)
    x = draw(1, 3, 4, 4, seed=5)
    found = scheduler.step(a, scheduler.timesteps[1], x, v0).prev_sample
    torch.testing.assert_close(found, x + v0 / 3 + 0.5 * a / 3)  # t' = 3 / 6


@pytest.mark.parametrize("h, timesteps", [(1.0, [1000, 750, 500, 250]), (1.5, [1000, 656.25, 375, 156.25])])
def test_timesteps_are_noise_levels_of_even_times(h, timesteps):
    """1 - t^2 - h (t - t^2): down from noise, and for inversion up from data."""
    scheduler = CAFScheduler(h)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == timesteps
    scheduler.set_timesteps(4, inverse=True)
    assert scheduler.timesteps.tolist() == [0, *reversed(timesteps[1:])]
    assert [scheduler.time(each) for each in scheduler.timesteps] == pytest.approx([1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("h", [0.01, 1.5, 2.0])
@pytest.mark.parametrize("N", [7, 100, 999])
def test_every_timestep_of_many_is_found_again(N, h):
    torch.testing.assert_close(run(N, h), X1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("h", [0, -1, 2.1, float("nan")])
def test_a_path_whose_noise_level_does_not_fall_is_refused(h):
    with pytest.raises(ValueError, match="wanted a number above 0 and at most 2"):
        CAFScheduler(h)


def test_nothing_is_clamped_unless_asked_for():
    assert run(2).abs().max() > 1
    torch.testing.assert_close(run(2, clip_sample=True), X1.clamp(-1, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("N", [0, -1, 1.5, None, True])
def test_a_number_of_steps_that_is_none_is_refused(N):
    with pytest.raises(ValueError, match="wanted an integer of at least 1"):
        CAFScheduler().set_timesteps(N)


def test_a_foreign_timestep_is_refused():
    scheduler, x = CAFScheduler(), draw(1, 3, 4, 4)
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(x, 1000, x, x)
    scheduler.set_timesteps(2)
    for foreign in (333, 0, float("nan")):
        with pytest.raises(ValueError, match=f"timestep is {foreign}, wanted one of the 2 in its timesteps, .* 1000"):
            scheduler.step(x, foreign, x, x)
    with pytest.raises(ValueError, match=r"call set_timesteps\(num_inference_steps, inverse=True\)"):
        scheduler.invert_step(x, 375, x, x)
    scheduler.set_timesteps(2, inverse=True)
    with pytest.raises(ValueError, match=r"call set_timesteps\(num_inference_steps\)"):
        scheduler.step(x, 375, x, x)


def test_shapes_that_differ_are_refused():
    scheduler, x = CAFScheduler(), draw(2, 3, 4, 4)
    scheduler.set_timesteps(1)
    with pytest.raises(ValueError, match="must have one shape"):
        scheduler.step(x, 1000, x, x[:1])


def test_it_is_loaded_as_it_was_saved(tmp_path):
    CAFScheduler(h=1.25, clip_sample=True).save_pretrained(tmp_path)
    config = CAFScheduler.from_pretrained(tmp_path).config
    assert config.clip_sample is True and config.h == 1.25
