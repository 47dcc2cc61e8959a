"""Stratified noise levels and ratios."""

import pytest
import torch

from shiva_ext.training import shared_ratios, stratified_ratios, stratified_timesteps
from shiva_ext.training.sampling import regional_timesteps


@pytest.mark.parametrize(("batch_size", "world"), [(1, 1), (16, 1), (4, 4), (1, 16), (3, 5)])
def test_the_parts_of_a_global_batch_hold_one_sample_of_every_interval(batch_size, world):
    parts = [stratified_timesteps(batch_size, rank, world) for rank in range(world)]
    sigma, B = torch.cat(parts), batch_size * world
    assert sigma.shape == (B,) and sigma.dtype == torch.float32
    for i in range(B):
        assert i / B - 1e-6 <= sigma[i].item() <= (i + 1) / B + 1e-6
    assert 0 <= sigma.min() and sigma.max() < 1


def test_positions_within_an_interval_are_uniform():
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([stratified_timesteps(4, 1, 2, generator) for _ in range(5000)])
    position = draws * 8 - torch.arange(4, 8)
    assert abs(position.mean() - 0.5) < 0.01 and abs(position.var() - 1 / 12) < 0.003


def test_the_mean_of_a_function_varies_less_than_with_uniform_sampling():
    """Eq. 27 and 28: only the variance within the intervals is left."""
    generator = torch.Generator().manual_seed(0)

    def ratio(sigma):
        return 0.8 - 0.4 * sigma

    stratified = torch.stack([ratio(stratified_timesteps(16, generator=generator)).mean() for _ in range(2000)])
    wanted = 0.4**2 / 12 / 16 / 16**2  # the uniform estimate's, divided by the square of the number of intervals
    assert stratified.var().item() == pytest.approx(wanted, rel=0.15)
    assert stratified.mean().item() == pytest.approx(0.6, abs=1e-3)


def test_the_last_interval_never_rounds_up_to_one():
    assert max(stratified_timesteps(1, 9999, 10000).item() for _ in range(2000)) < 1


@pytest.mark.parametrize("groups", [1, 4, 16])
def test_ratios_come_from_disjoint_intervals_that_cover_the_range(groups):
    ratios = stratified_ratios(groups, 0.3, 0.95)
    interval = ((ratios - 0.3) / 0.65 * groups).floor().clamp(max=groups - 1).sort().values
    assert torch.equal(interval, torch.arange(groups).float())
    assert ratios.min() >= 0.3 and ratios.max() <= 0.95


def test_ratios_are_dealt_out_at_random_and_reproducibly():
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([stratified_ratios(8, 0.3, 0.95, generator) for _ in range(3000)])
    torch.testing.assert_close(draws.mean(dim=0), torch.full((8,), 0.625), atol=0.02, rtol=0)
    again = stratified_ratios(8, 0.3, 0.95, torch.Generator().manual_seed(0))
    assert torch.equal(again, draws[0])


def test_the_shared_ratio_is_the_mean_and_passes_gradients():
    ratios = torch.rand(4, 3, requires_grad=True)
    shared = shared_ratios(ratios)
    torch.testing.assert_close(shared, sum(ratios) / 4)
    shared.sum().backward()
    torch.testing.assert_close(ratios.grad, torch.full((4, 3), 0.25))


@pytest.mark.parametrize("arguments", [(0, 0, 1), (4, 2, 2), (4, -1, 2), (4, 0, 0)])
def test_an_impossible_part_of_a_batch_is_an_error(arguments):
    with pytest.raises(ValueError, match="rank from 0 to world - 1"):
        stratified_timesteps(*arguments)


@pytest.mark.parametrize(
    "arguments", [(0, 0.3, 0.9), (4, 0.9, 0.3), (4, 0.0, 0.9), (4, 0.3, 1.1), (4, 0.3, float("nan"))]
)
def test_an_impossible_range_of_ratios_is_an_error(arguments):
    with pytest.raises(ValueError, match="0 < low < high <= 1"):
        stratified_ratios(*arguments)
    with pytest.raises(ValueError, match="wanted \\[samples, layers\\]"):
        shared_ratios(torch.rand(4))


@pytest.mark.parametrize(("parts", "regions"), [(2, 10), (4, 4), (3, 2), (1, 5), (4, 1)])
def test_each_part_draws_from_one_region_and_all_regions_have_their_turn(parts, regions):
    seen = torch.zeros(regions)
    for seed in range(60):
        found = regional_timesteps(4, parts, regions, torch.Generator().manual_seed(seed))
        places = [(levels * regions).long() for levels in found]
        assert len(found) == parts and all(levels.shape == (4,) for levels in found)
        assert all((place == place[0]).all() for place in places)
        firsts = [int(place[0]) for place in places]
        assert len(set(firsts)) == min(parts, regions)
        seen[firsts] += 1
    assert (seen > 0).all()


def test_as_many_regions_as_parts_are_the_stratified_levels():
    found = regional_timesteps(3, 4, 4, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    assert all(torch.equal(found[i], stratified_timesteps(3, i, 4, generator)) for i in range(4))


def test_no_regions_are_refused():
    with pytest.raises(ValueError, match="regions is 0"):
        regional_timesteps(2, 2, 0)
