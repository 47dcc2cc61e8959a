"""The published figures of FEATHER: the grids, the numbers of tokens, the operations saved."""

import pytest

from shiva_ext.vlm import FastVConfig, FeatherConfig, Stage, expected_union, flops_reduction, grid_tokens

N, WIDTH, INNER, LAYERS = 729, 4096, 11008, 32  # Llama-2-7B and 27 x 27 tokens


@pytest.mark.parametrize(("stride", "wanted"), [(1, 729), (2, 196), (3, 81)])
def test_the_grids_of_27_by_27_tokens(stride, wanted):
    tokens = grid_tokens(27, 27, stride)
    assert len(tokens) == len(set(tokens)) == wanted
    assert all(t // 27 % stride == 0 and t % 27 % stride == 0 for t in tokens)
    assert tokens == sorted(tokens)


def test_feathers_stages_keep_275_and_24_tokens():
    first, second = FeatherConfig().stages()
    assert (first.layer, second.layer, first.stride, second.stride) == (8, 16, 3, 0)
    top = int(first.share * N)
    assert top == 218
    union = expected_union(N, top, 81)
    assert round(union) == 275 and int(second.share * union) == 24


@pytest.mark.parametrize(
    ("tokens", "layers", "wanted"),
    [
        ([N, N / 4], [3, 29], 0.686),
        ([N, expected_union(N, N // 4, 81)], [3, 29], 0.612),
        ([N, expected_union(N, N // 4, 81)], [8, 24], 0.506),
        ([N, 275, 24], [8, 8, 16], 0.642),
    ],
    ids=["FastV", "ensemble at 3", "ensemble at 8", "FEATHER"],
)
def test_the_operations_saved_are_the_papers(tokens, layers, wanted):
    assert flops_reduction(tokens, layers, WIDTH, INNER) == pytest.approx(wanted, abs=5e-4)


def test_fastv_is_one_stage_that_sees_positions():
    config = FastVConfig().feather()
    assert config.stages() == [Stage(3, 0.25)] and config.rope and not FeatherConfig().rope


def test_a_ratio_of_zero_removes_nothing():
    assert FeatherConfig(ratio=0.0).stages() == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"ratio": 1.0}, r"\[0, 1\), got 1\.0"),
        ({"ratio": float("nan")}, "got nan"),
        ({"layers": ()}, "ascending"),
        ({"layers": (0, 3)}, "at least 1"),
        ({"layers": (5, 3)}, "ascending"),
        ({"stride": -1}, "stride"),
    ],
)
def test_wrong_settings_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        FeatherConfig(**wrong)
