"""What only a GPU has: streams, devices, asynchrony, its memory, and its rounding."""

import pytest
import torch
from gpu_cases import GPU, Case
from ops.cases import LARGE, LAYOUTS, OPS, TYPICAL, Maker, forward_backward, lay_out, native, wide
from ops.device import place
from ops.matrix import same_bits
from units import most_units, units_apart

from shiva_ext import ops, reference

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SLEEP = 1_000_000_000  # clock ticks: about half a second


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layouts_of_the_suite_are_those_of_the_cpu(layout):
    t = lay_out(torch.randn(2, 3, 5), layout) if layout != "expanded" else torch.randn(1, 3, 5).expand(2, 3, 5)
    moved = place(t, GPU)
    assert (moved.stride(), moved.storage_offset()) == (t.stride(), t.storage_offset())
    whole = torch.empty(0).set_(t.untyped_storage())
    moved_whole = torch.empty(0, device=GPU).set_(moved.untyped_storage())
    assert same_bits(moved_whole.cpu(), whole)  # with the poison between the elements


@pytest.mark.parametrize("key", OPS)
def test_an_op_runs_on_the_current_stream_and_on_no_other(key):
    case = Case(key, TYPICAL, torch.float32)
    old, new = case.values(seed=0), case.values(seed=1)
    case.fill(new)
    wanted = case.run()
    case.fill(old)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        case.run()  # gets this stream its memory, which is not to be had while another one is busy
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP)  # the default stream is busy...
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP // 10)  # ...and the data comes late, on the side stream
        case.fill(new)
        got = case.run()
    side.synchronize()
    assert not torch.cuda.default_stream().query(), "something waited for the default stream"
    assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@pytest.mark.parametrize("key", OPS)
def test_no_op_waits_for_the_device(key, layout):
    for size in (TYPICAL, LARGE):
        case = Case(key, size, torch.bfloat16, layout)
        torch.cuda.set_sync_debug_mode("error")
        try:
            case.run()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_in_place_op_and_the_wrapper_of_soft_rank_do_not_wait_either():
    m = Maker(TYPICAL, torch.float32, layout="sliced", device=GPU)
    base, index, src, scores = m.tokens(), m.index(), m.floats(m.k, m.D), m.scores()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.token_scatter_(base, index, src)
        ops.soft_rank(scores, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- several devices


def need_two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is only one GPU")


@pytest.mark.parametrize("key", OPS)
def test_an_op_runs_where_its_tensors_are(key):
    need_two_gpus()
    second = Case(key, TYPICAL, torch.float32, device=torch.device("cuda:1"))
    with torch.cuda.device(0):
        got, wanted = second.run(), Case(key, TYPICAL, torch.float32, device=torch.device("cuda:0")).run()
        assert torch.cuda.current_device() == 0
    assert all(t.device == torch.device("cuda:1") for t in got)
    if torch.cuda.get_device_capability(0) == torch.cuda.get_device_capability(1):
        assert all(same_bits(a.cpu(), b.cpu()) for a, b in zip(got, wanted, strict=True))


def assert_device_error(key: str, name: str, where: str, api: str, said: str) -> None:
    """A call with this one argument elsewhere raises, and its message names the op and what is said."""
    op = OPS[key]
    arguments = op.arguments(Maker(TYPICAL, torch.float32, device=torch.device("cuda:0")))
    arguments[name] = arguments[name].to(where)
    function = native(op) if api == "raw" else getattr(ops, op.name)
    with pytest.raises(RuntimeError, match=rf"\b{op.name}: .*{said}.*move all arguments to one device"):
        function(*arguments.values())
    torch.cuda.synchronize()  # nothing was launched that could fail later


PLACES = [
    pytest.param(key, name, id=f"{key}-{name}")
    for key in OPS
    for name, a in OPS[key].arguments(Maker(TYPICAL, torch.float32)).items()
    if torch.is_tensor(a) and OPS[key].name not in ("topk_select", "soft_rank")
]


@pytest.mark.parametrize("api", ["wrapper", "raw"])
@pytest.mark.parametrize(("key", "name"), PLACES)
def test_an_argument_on_the_cpu_is_refused_by_name(key, name, api):
    assert_device_error(key, name, "cpu", api, rf"\b{name} is on another device than the GPU")


@pytest.mark.parametrize("api", ["wrapper", "raw"])
@pytest.mark.parametrize(("key", "name"), PLACES)
def test_an_argument_on_another_gpu_is_refused(key, name, api):
    need_two_gpus()
    assert_device_error(key, name, "cuda:1", api, "GPU 1")


# ---- beside the CPU


def special_scores(B: int, N: int, dtype: torch.dtype, content: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if content == "any bits":  # NaN of any sign and payload, infinities, subnormal numbers
        integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
        info = torch.iinfo(integer)
        return torch.randint(info.min, info.max, (B, N), dtype=integer, generator=generator).view(dtype)
    if content == "few values":
        values = [0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, -torch.nan]
        values += [torch.finfo(dtype).tiny / 4, -torch.finfo(dtype).tiny / 4]
        return torch.tensor(values, dtype=dtype)[torch.randint(len(values), (B, N), generator=generator)]
    if content == "zeros of both signs":
        return torch.tensor([0.0, -0.0], dtype=dtype)[torch.randint(2, (B, N), generator=generator)]
    return torch.randn(B, N, dtype=torch.float64, generator=generator).to(dtype)


@pytest.mark.parametrize("N", [1, 2, 31, 33, 255, 256, 257, 1000, 1024, 1025, 4096, 4097, 16385, 32768, 32769, 70000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("content", ["any bits", "few values", "zeros of both signs", "random"])
def test_topk_select_gives_the_indices_of_the_cpu(content, dtype, N):
    for seed in range(10 if N <= 1025 else 2):
        scores = special_scores(3, N, dtype, content, seed)
        for k in {1, N // 3, N - 1} & set(range(1, N)):
            here, there = ops.topk_select(scores, k), ops.topk_select(scores.to(GPU), k)
            assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True)), (seed, k)


@pytest.mark.parametrize("size", [TYPICAL, LARGE], ids=["typical", "large"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key", [key for key in OPS if OPS[key].leaves])
def test_values_are_those_of_the_cpu_within_a_stated_distance(key, dtype, size):
    op = OPS[key]
    here = forward_backward(native(op), op, Maker(size, dtype, device=torch.device("cpu")))
    there = forward_backward(native(op), op, Maker(size, dtype, device=GPU))
    eps = torch.finfo(dtype if op.rounds_hidden else wide(dtype)).eps
    for part, exact in ((0, op.copies), (1, op.copies_gradient)):
        for got, wanted in zip(there[part], here[part], strict=True):
            got, wanted = got.detach().cpu(), wanted.detach()
            assert got.dtype == wanted.dtype
            if exact:
                assert same_bits(got, wanted)
            else:
                assert units_apart(got, wanted, eps) <= most_units(op.name)


# ---- memory


def test_soft_rank_holds_memory_of_order_n():
    def peak(N: int) -> int:
        scores = torch.randn(1, N, device=GPU, requires_grad=True)
        ones = torch.ones(1, N, device=GPU)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(ops.soft_rank(scores, 0.1), scores, ones)
        return torch.cuda.max_memory_allocated() - before

    peak(512)
    assert peak(32768) <= 32768 * 128  # N x N floats would be 4 GiB
    assert peak(131072) <= 131072 * 128


def need_memory(gib: int) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free:.0f} are free")


@pytest.mark.parametrize(("B", "N"), [(65537, 32768), (40000, 53690)], ids=["short rows", "long rows"])
def test_topk_select_of_more_than_2_to_the_31_scores(B, N):
    need_memory(26)
    scores = torch.randn(B, N, dtype=torch.bfloat16, device=GPU)
    assert scores.numel() > 2**31
    results = ops.topk_select(scores, N // 3)
    for row in (0, B // 2, B - 1):
        wanted = reference.topk_select(scores[row : row + 1].cpu(), N // 3)
        assert all(torch.equal(got[row : row + 1].cpu(), w) for got, w in zip(results, wanted, strict=True))


@pytest.mark.parametrize("shape", [(65537, 32769, 1), (2, 40000, 27000)], ids=["rows", "channels"])
def test_token_gather_of_more_than_2_to_the_31_elements(shape):
    need_memory(8)
    B, N, D = shape
    x = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, device=GPU).view(torch.bfloat16)
    assert x.numel() > 2**31
    index = torch.tensor([[N - 1, 0, N // 2]], device=GPU).repeat(B, 1)
    got, wanted = ops.token_gather(x, index), x[:, [N - 1, 0, N // 2]]
    assert same_bits(got, wanted)
