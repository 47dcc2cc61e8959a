"""What rejected tokens get."""

import math
from dataclasses import replace

import pytest
import torch
from models.tiny import LAYERS, make_artifact, make_inputs, make_model

import shiva_ext
from shiva_ext.methods.memory import RunMemory
from shiva_ext.reconstruct import Coarse, nearest_kept, num_squares, reconstruct
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


@pytest.mark.parametrize("grid", [(8, 8), (5, 9), (3, 2)])
def test_coarse_is_the_mean_of_what_a_square_lost(grid):
    N, window = grid[0] * grid[1], 4
    torch.manual_seed(0)
    x = torch.randn(3, N, 2)
    kept = torch.stack([torch.randperm(N)[: N // 2].sort().values for _ in range(3)])
    kept[0] = torch.arange(N // 2)  # whole squares of it
    coarse = Coarse(x, kept, grid)
    columns = -(-grid[1] // window)
    assert coarse.tokens.shape[1] == num_squares(grid) == -(-grid[0] // window) * columns
    processed = torch.randn_like(coarse.tokens)
    spread = coarse.spread(x, processed)
    for b in range(3):
        for m in range(num_squares(grid)):
            inside = [i for i in range(N) if i // grid[1] // window * columns + i % grid[1] // window == m]
            lost = [i for i in inside if i not in kept[b].tolist()] or inside
            torch.testing.assert_close(coarse.tokens[b, m], x[b, lost].mean(dim=0))
            assert int(coarse.places[b, m]) in inside
            for i in inside:
                torch.testing.assert_close(spread[b, i], x[b, i] + processed[b, m] - coarse.tokens[b, m])


def test_coarse_tokens_run_with_the_kept_ones_and_count():
    """The block gets k + 1 tokens of the one square, its own count says so, and a square too many makes it dense."""
    model, seen = make_model(), []
    model.transformer_blocks[2].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )
    with shiva_ext.enable(model, RandomSelector(0.5), reconstruct="coarse"):
        model(**make_inputs())
        summary = shiva_ext.summary(model)
    with shiva_ext.enable(model, RandomSelector(0.5)):
        plain = shiva_ext.summary(model)
    assert summary.kept == plain.kept and plain.flops[0] < summary.flops[0]
    block = [pruned.flops[0] for pruned in (summary, plain)]
    with shiva_ext.enable(model, RandomSelector(9 / 16)):
        assert shiva_ext.summary(model).flops[0] == block[0]  # 9 tokens, whatever they stand for
    with shiva_ext.enable(model, RandomSelector(15 / 16), reconstruct="coarse"), torch.no_grad():
        pruned = model(**make_inputs())[0]
        assert shiva_ext.summary(model).kept[0] == (16,) * LAYERS
    assert torch.equal(pruned, model(**make_inputs())[0].detach())


def test_an_artefact_remembers_what_it_was_trained_with(tmp_path):
    model, artifact = make_model(), make_artifact()
    artifact = replace(artifact, reconstruct="coarse")
    artifact.save(tmp_path)
    with torch.no_grad():
        with shiva_ext.enable(model, tmp_path):
            own = model(**make_inputs())[0]
        with shiva_ext.enable(model, artifact, reconstruct="coarse"):
            assert torch.equal(model(**make_inputs())[0], own)
        with shiva_ext.enable(model, artifact, reconstruct="identity"):
            assert not torch.equal(model(**make_inputs())[0], own)


@pytest.mark.parametrize(
    "source", [RandomSelector(0.5), LargestNormSelector(0.5), "artifact"], ids=["random", "norm", "artifact"]
)
@pytest.mark.parametrize("how", ["nearest", "last", "coarse"])
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
