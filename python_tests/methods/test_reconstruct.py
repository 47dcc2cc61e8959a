"""What rejected tokens get."""

import math

import pytest
import torch
from models.tiny import LAYERS, make_artifact, make_inputs, make_model

import shiva_ext
from shiva_ext.methods.memory import RunMemory
from shiva_ext.reconstruct import nearest_kept, reconstruct
from shiva_ext.selection import LargestNormSelector, RandomSelector


@pytest.mark.parametrize("grid", [(1, 7), (5, 3), (6, 6)])
def test_nearest_kept_against_a_loop(grid):
    total = grid[0] * grid[1]
    kept = torch.stack([torch.randperm(total)[:3].sort().values for _ in range(4)])
    found = nearest_kept(kept, grid)
    for b in range(4):
        for i in range(total):
            distance = [math.dist((i // grid[1], i % grid[1]), (int(j) // grid[1], int(j) % grid[1])) for j in kept[b]]
            assert found[b, i] == distance.index(min(distance))


def test_nearest_adds_the_neighbours_update():
    x, kept = torch.randn(1, 4, 2), torch.tensor([[0, 3]])
    processed = torch.randn(1, 2, 2)
    found = reconstruct("nearest", x, kept, processed, (1, 4), RunMemory(), 1)
    torch.testing.assert_close(found[:, kept[0]], processed)
    torch.testing.assert_close(found[0, 1], x[0, 1] + processed[0, 0] - x[0, 0])
    torch.testing.assert_close(found[0, 2], x[0, 2] + processed[0, 1] - x[0, 3])


def test_last_adds_the_tokens_own_update_of_before():
    memory, x = RunMemory(), torch.randn(1, 3, 2)
    memory.begin(1.0, x)
    first = torch.randn(1, 2, 2)
    found = reconstruct("last", x, torch.tensor([[0, 1]]), first, (1, 3), memory, 1)
    assert torch.equal(found[0, 2], x[0, 2])  # never kept yet
    memory.begin(0.5, x)
    later, second = torch.randn(1, 3, 2), torch.randn(1, 1, 2)
    found = reconstruct("last", later, torch.tensor([[2]]), second, (1, 3), memory, 1)
    torch.testing.assert_close(found[0, :2], later[0, :2] + first[0] - x[0, :2])
    torch.testing.assert_close(found[0, 2], second[0, 0])


@pytest.mark.parametrize(
    "source", [RandomSelector(0.5), LargestNormSelector(0.5), "artifact"], ids=["random", "norm", "artifact"]
)
@pytest.mark.parametrize("how", ["nearest", "last"])
def test_every_selector_takes_it(source, how):
    model = make_model()
    source = make_artifact() if source == "artifact" else source

    @torch.no_grad()
    def outputs(**options):
        with shiva_ext.enable(model, source, batched_guidance=False, **options) as handle:
            handle.record()
            found = [model(**make_inputs(sigma=s, seed=i))[0] for i, s in enumerate((0.9, 0.6, 0.3))]
            assert {k for r in handle.records for k in r["kept"]} <= set(range(1, LAYERS))
            summary = shiva_ext.summary(model)
        return found, summary

    plain, _ = outputs()
    changed, summary = outputs(reconstruct=how)
    assert all(torch.isfinite(each).all() for each in changed)
    assert not torch.equal(plain[2], changed[2])
    assert set(summary.wrapped.values()) == {f"reconstruct={how!r}"}
    again, _ = outputs(reconstruct=how)
    assert all(torch.equal(a, b) for a, b in zip(changed, again, strict=True))
