"""CUDA graphs, captured once and replayed on new values in the same places: every op, and a pruned SD3 transformer."""

import pytest
import torch
from gpu_cases import CLOSE, GPU, Case, on_gpu
from models.tiny import make_artifact, make_inputs, make_model
from ops.cases import LARGE, OPS, TYPICAL, Maker, Size
from ops.matrix import same_bits

import shiva_ext
from shiva_ext import ops
from shiva_ext.selection import LargestNormSelector, RandomSelector

pytestmark = pytest.mark.gpu


def capture(call):
    """A graph of call, and the tensors that its replays write."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()  # loads the kernels, and gives cuBLAS its workspace
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def assert_replays(case: Case) -> None:
    graph, results = capture(case.run)
    for seed in (1, 2):
        for t in results:
            t.zero_()  # so that a result that is not written is noticed; one may be an argument, so values come after
        case.fill(case.values(seed))
        graph.replay()
        assert all(same_bits(a, b) for a, b in zip(results, case.run(), strict=True)), seed


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("key", OPS)
def test_an_op_and_its_gradient_are_replayed(key, dtype, layout):
    assert_replays(Case(key, TYPICAL, dtype, layout))


@pytest.mark.parametrize("key", OPS)
def test_a_large_op_and_its_gradient_are_replayed(key):
    assert_replays(Case(key, LARGE, torch.bfloat16))


@pytest.mark.parametrize("key", ["topk_select", "soft_rank"])
def test_rows_for_several_blocks_are_replayed(key):
    assert_replays(Case(key, Size(B=2, N=40000, k=24000, D=1, H=1), torch.float32))


def test_the_in_place_op_is_replayed():
    makers = [Maker(TYPICAL, torch.float32, seed=seed, device=GPU) for seed in (0, 1)]
    static, new = [[m.tokens(), m.index(), m.floats(m.k, m.D)] for m in makers]
    graph, _ = capture(lambda: ops.token_scatter_(*static))
    for own, value in zip(static, new, strict=True):
        own.copy_(value)
    wanted = ops.token_scatter(*static)
    graph.replay()
    assert same_bits(static[0], wanted)


# ---- the transformer


SOURCES = {
    "artefact": make_artifact,
    "random": lambda: RandomSelector(0.6),
    "largest norm": lambda: LargestNormSelector(0.6),
}


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("source", SOURCES)
@torch.no_grad()
def test_a_pruned_sd3_transformer_is_replayed(source, guided):
    model = make_model().to(GPU)
    handle = shiva_ext.enable(model, SOURCES[source](), batched_guidance=guided).at(0.5)
    static = on_gpu(make_inputs())
    graph, (out,) = capture(lambda: model(**static))
    seen = []
    for seed in (5, 6):
        for name, value in make_inputs(seed=seed).items():
            if torch.is_tensor(value):
                static[name].copy_(value)
        graph.replay()
        torch.testing.assert_close(out, model(**static)[0], **CLOSE)
        seen.append(out.clone())
    assert handle.num_hooked == 3 and not torch.allclose(*seen, **CLOSE)
