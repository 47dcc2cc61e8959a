"""RatioTable, and the budget solver against brute force."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from shiva_ext.selection import RatioPolicy, RatioTable


def small_table():
    return RatioTable([0.1, 0.5, 0.9], torch.tensor([[1, 0.2, 0.3], [1, 0.5, 0.7], [1, 0.9, 1.0]]))


def test_the_nearest_noise_level_counts_and_the_lower_one_at_a_midpoint():
    table = small_table()
    for sigma, row in ((0.0, 0), (0.1, 0), (0.29, 0), (0.31, 1), (0.69, 1), (0.71, 2), (1.0, 2)):
        assert table.ratios(sigma) == tuple(table.ratios_tensor[row].tolist())
    table = RatioTable([0.25, 0.75], torch.tensor([[1, 0.2], [1, 0.4]]))
    assert table.ratios(0.5) == table.ratios(0.25)


def test_tokens_are_python_ints_and_a_ratio_of_one_is_all_of_them():
    for num_tokens in (1, 7, 256, 4096, 65536):
        for tile in (1, 64, 100000):
            counts = small_table().tokens(0.9, num_tokens, tile)
            assert all(type(count) is int and 1 <= count <= num_tokens for count in counts)
            assert counts[0] == counts[2] == num_tokens


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 10, 100, 255, 256, 4096, 16384])
def test_a_count_divided_by_the_tokens_comes_back_as_the_same_count(num_tokens):
    counts = range(1, num_tokens + 1, max(num_tokens // 500, 1))
    for k in counts:
        assert RatioTable.fixed(k / num_tokens, 2).tokens(0.5, num_tokens)[1] == k


def test_tokens_are_floored_then_rounded_to_the_nearest_tile():
    def tokens(ratio, num_tokens, tile):
        return RatioTable.fixed(ratio, 2).tokens(0.5, num_tokens, tile)[1]

    assert tokens(0.999, 100, 1) == 99
    assert tokens(0.001, 100, 1) == 1
    assert tokens(0.60, 256, 64) == 128  # floor 153
    assert tokens(0.626, 256, 64) == 192  # floor 160, the midpoint
    assert tokens(0.01, 256, 64) == 64
    assert tokens(0.95, 90, 64) == 90  # floor 85: all 90 are nearer than 64
    assert tokens(0.5, 30, 64) == 30


@pytest.mark.parametrize("sigma", [-0.01, 1.01, float("nan"), 500.0])
def test_a_noise_level_outside_zero_to_one_is_an_error(sigma):
    with pytest.raises(ValueError, match="timestep / 1000"):
        small_table().ratios(sigma)


def test_no_tokens_and_no_tile_are_errors():
    with pytest.raises(ValueError, match="num_tokens is 0"):
        small_table().tokens(0.5, 0)
    with pytest.raises(ValueError, match="tile 0"):
        small_table().tokens(0.5, 10, 0)


@pytest.mark.parametrize(
    ("sigmas", "ratios", "first_layer", "message"),
    [
        ([0.5, 0.5], [[1, 0.5], [1, 0.5]], 1, "strictly ascending"),
        ([0.6, 0.5], [[1, 0.5], [1, 0.5]], 1, "strictly ascending"),
        ([0.5, 1.5], [[1, 0.5], [1, 0.5]], 1, "strictly ascending"),
        ([float("nan")], [[1, 0.5]], 1, "strictly ascending"),
        ([0.5], [[1, 0.0]], 1, r"outside \(0, 1\]"),
        ([0.5], [[1, 1.1]], 1, r"outside \(0, 1\]"),
        ([0.5], [[1, float("nan")]], 1, r"outside \(0, 1\]"),
        ([0.5], [[0.9, 0.5]], 1, "must be 1"),
        ([0.5], [[1, 0.5]], 2, "first_layer is 2"),
        ([0.5, 0.6], [[1, 0.5]], 1, r"\[S\] and \[S,L\]"),
        ([], torch.ones(0, 2), 1, "S at least 1"),
    ],
)
def test_a_bad_table_is_an_error(sigmas, ratios, first_layer, message):
    with pytest.raises(ValueError, match=message):
        RatioTable(sigmas, torch.as_tensor(ratios), first_layer)


def test_a_table_from_a_policy_holds_its_ratios_in_ascending_order_of_noise():
    torch.manual_seed(0)
    policy = RatioPolicy(num_layers=4, target=0.6, hidden=8)
    torch.nn.init.normal_(policy.time[2].weight)
    table = RatioTable.from_policy(policy, [0.9, 0.1, 0.5, 0.1])
    torch.testing.assert_close(torch.tensor(table.sigmas), torch.tensor([0.1, 0.5, 0.9]))
    torch.testing.assert_close(table.ratios_tensor, policy(torch.tensor([0.1, 0.5, 0.9])).detach())
    assert table.mean() == pytest.approx(table.ratios_tensor[:, 1:].mean().item())


def test_a_table_survives_safetensors(tmp_path):
    table = small_table()
    save_file(table.to_tensors(), tmp_path / "table.safetensors")
    copy = RatioTable.from_tensors(load_file(tmp_path / "table.safetensors"))
    assert copy == table and copy.ratios(0.3) == table.ratios(0.3) and copy != RatioTable.fixed(0.5, 3)


def test_a_fixed_table_is_dense_before_the_first_layer():
    assert RatioTable.fixed(0.6, 4, first_layer=2).tokens(0.3, 10) == (10, 10, 6, 6)
    assert RatioTable.fixed(0.6, 4, first_layer=2).mean() == pytest.approx(0.6)


def test_a_table_with_a_budget_gives_the_solved_counts_and_keeps_dense_layers():
    table = RatioTable.from_policy(RatioPolicy(num_layers=4, target=0.7, hidden=8), torch.linspace(0, 1, 5))
    solved = table.with_budget(0.55, 256, tile=16)
    counts = [solved.tokens(sigma, 256, tile=16) for sigma in solved.sigmas]
    assert {row[0] for row in counts} == {256}
    assert sum(sum(row[1:]) for row in counts) == pytest.approx(0.55 * 256 * 15, abs=8)
    assert counts == [solved.tokens(sigma, 256) for sigma in solved.sigmas]
