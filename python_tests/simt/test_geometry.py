"""Which form of a kernel runs for which size, and on how many blocks and threads.

A wrong choice may give right values, only slower, or right by luck: the values cannot tell. The expected launches are
those that docs/gpu_performance.md argues for.
"""

import re

import pytest
import torch

from .test_simulated import load_simulated

EPS, TAU = 1e-5, 0.1


@pytest.fixture(scope="module")
def simulated():
    return load_simulated()


def launches(simulated, call) -> list[str]:
    """ "kernel<arguments> blocks x threads" of each launch."""
    simulated.take_launches()
    call()
    found = []
    for text, blocks, threads in simulated.take_launches():
        name = re.search(r"kKernel = (.+?)(?:; |\]$)", text)[1]
        found.append(f"{re.sub(r'(shiva|cuda|simt)::', '', name)} {blocks} x {threads}")
    return found


def rows(
    B: int, N: int, D: int, dtype=torch.float32, misaligned: bool = False, row_stride: int = 0, batch_stride: int = 0
) -> torch.Tensor:
    """[B,N,D]; misaligned by one element, or with more elements from row to row."""
    stride = row_stride or D
    flat = torch.randn(B * N * stride + 16)
    flat = flat.to(dtype)[1:] if misaligned else flat.to(dtype)
    return flat.as_strided((B, N, D), (batch_stride or N * stride, stride, 1), flat.storage_offset())


def first(B: int, k: int) -> torch.Tensor:
    return torch.arange(k).expand(B, k).contiguous()


ROW, CHAIN = "topk_select_row_kernel", ["topk_count_digits_kernel", "topk_choose_digit_kernel"]


@pytest.mark.parametrize(
    "N, dtype, threads, keys",
    [
        *[(256, t, 256, 1) for t in (torch.float32, torch.bfloat16, torch.float64)],
        (257, torch.float32, 256, 4),
        (1024, torch.float32, 256, 4),
        (1025, torch.float16, 512, 8),
        (4096, torch.float32, 512, 8),
        (4097, torch.float32, 512, 32),
        (16384, torch.float64, 512, 32),
        (16385, torch.float32, 512, 64),
        (32768, torch.bfloat16, 512, 64),
    ],
)
def test_topk_select_takes_one_block_a_row(simulated, N, dtype, threads, keys):
    scores = torch.randn(2, N).to(dtype)
    (launch,) = launches(simulated, lambda: torch.ops.shiva_simt.topk_select(scores, N // 2))
    assert re.fullmatch(rf"{ROW}<\w+, {threads}, {keys}> 2 x {threads}", launch)


@pytest.mark.parametrize("N, dtype, digits", [(32769, torch.float32, 4), (16385, torch.float64, 8)])
def test_topk_select_takes_many_blocks_for_longer_rows(simulated, N, dtype, digits):
    scores, chunks = torch.randn(2, N).to(dtype), -(-N // 8192)
    found = launches(simulated, lambda: torch.ops.shiva_simt.topk_select(scores, N // 2))
    names = ["topk_start_kernel", *CHAIN * digits, "topk_count_chunks_kernel", "topk_place_chunks_kernel"]
    blocks = [1, *[2 * chunks, 2] * digits, 2 * chunks, 2 * chunks]
    assert [(re.sub(r"<.*", "", text), text.split("> ")[1]) for text in found] == [
        (name, f"{count} x 256") for name, count in zip(names, blocks, strict=True)
    ]


@pytest.mark.parametrize(
    "N, wanted",
    [
        (512, ["pairs_kernel<float, 4, false, false> 72 x 256", "combine_kernel<float, false, false> 4 x 256"]),
        (
            513,
            [
                "sort_kernel<float> 2 x 512",
                "pairs_kernel<float, 8, true, false> 30 x 256",
                "combine_kernel<float, true, false> 5 x 256",
            ],
        ),
        (
            1025,
            [
                "sort_kernel<float> 4 x 512",
                "merge_kernel<float> 9 x 256",
                "pairs_kernel<float, 8, true, false> 90 x 256",
                "combine_kernel<float, true, false> 9 x 256",
            ],
        ),
        # 17 tiles of 128 tokens: two to a part, nine parts, 45 pairs of parts
        (
            2050,
            [
                "sort_kernel<float> 6 x 512",
                "merge_kernel<float> 17 x 256",
                "pairs_kernel<float, 8, true, false> 90 x 256",
                "combine_kernel<float, true, false> 17 x 256",
            ],
        ),
    ],
)
def test_soft_rank_sorts_rows_of_more_than_512_tokens(simulated, N, wanted):
    scores = 64 * torch.randn(2, N)
    found = launches(simulated, lambda: torch.ops.shiva_simt.soft_rank(scores, TAU))
    assert found == [f"soft_rank_{text}" for text in wanted]


@pytest.mark.parametrize(
    "D, options, wanted",
    [
        (1024, {}, "gather_modulate_kernel<float, 4, 8, true> 2 x 256"),
        (1028, {}, "gather_modulate_kernel<float, 4, 4, false> 12 x 96"),
        (1536, {}, "gather_modulate_kernel<float, 4, 4, false> 12 x 96"),
        (16384, {}, "gather_modulate_kernel<float, 4, 4, false> 12 x 1024"),
        (16388, {}, "gather_modulate_wide_kernel<float, 4> 12 x 512"),
        (256, {"misaligned": True}, "gather_modulate_kernel<float, 1, 8, true> 2 x 256"),
        (256, {"row_stride": 258}, "gather_modulate_kernel<float, 1, 8, true> 2 x 256"),
        (256, {"batch_stride": 8 * 256 + 2}, "gather_modulate_kernel<float, 1, 8, true> 2 x 256"),
        (254, {}, "gather_modulate_kernel<float, 1, 8, true> 2 x 256"),
        (257, {}, "gather_modulate_wide_kernel<float, 1> 12 x 512"),
    ],
)
def test_gather_modulate_keeps_a_row_in_a_warp_or_a_block(simulated, D, options, wanted):
    x, scale = rows(2, 8, D, **options), torch.randn(2, D)
    call = torch.ops.shiva_simt.gather_modulate
    assert launches(simulated, lambda: call(x, first(2, 6), scale, scale, EPS)) == [wanted]


@pytest.mark.parametrize("B, N, options", [(1, 8, {"batch_stride": 7}), (2, 1, {"row_stride": 65, "batch_stride": 64})])
def test_the_stride_of_a_single_row_does_not_matter(simulated, B, N, options):
    x, same, scale = rows(B, N, 64, **options), rows(B, N, 64), torch.randn(B, 64)
    modulate, scatter = torch.ops.shiva_simt.gather_modulate, torch.ops.shiva_simt.scatter_residual
    (found,) = launches(simulated, lambda: modulate(x, first(B, N), scale, scale, EPS))
    assert found.startswith("gather_modulate_kernel<float, 4, 8, true>")
    found = launches(simulated, lambda: scatter(x, first(B, N), same, scale))
    assert found[-1].startswith("scatter_residual_kernel<float, 4>")


@pytest.mark.parametrize(
    "D, k, options, wanted",
    [
        (8192, 9, {}, "gather_modulate_backward_kernel<float, 4, 4> 4 x 512"),
        (8196, 9, {}, "gather_modulate_backward_wide_kernel<float, 4> 4 x 512"),
        (1024, 8, {"misaligned": True}, "gather_modulate_backward_kernel<float, 1, 2> 2 x 512"),
        (1024, 8, {"row_stride": 1026}, "gather_modulate_backward_kernel<float, 1, 2> 2 x 512"),
        (1025, 8, {}, "gather_modulate_backward_wide_kernel<float, 1> 2 x 512"),
        # chunks of 8 rows, of 9 for more than 2 x 8192, of 32 at most
        (4, 8192, {}, "gather_modulate_backward_kernel<float, 4, 4> 2048 x 32"),
        (4, 8193, {}, "gather_modulate_backward_kernel<float, 4, 4> 1822 x 32"),
        (4, 32769, {}, "gather_modulate_backward_kernel<float, 4, 4> 2050 x 32"),
    ],
)
def test_gather_modulate_backward_takes_a_block_for_a_chunk_of_rows(simulated, D, k, options, wanted):
    x, grad, scale = rows(2, k, D, **options), rows(2, k, D), torch.randn(2, D)
    call = torch.ops.shiva_simt.gather_modulate_backward
    assert launches(simulated, lambda: call(grad, x, first(2, k), scale, EPS))[2] == wanted


@pytest.mark.parametrize("argument", ["grad", "scale"])
def test_gather_modulate_backward_reads_what_is_misaligned_one_by_one(simulated, argument):
    arguments = {"grad": rows(1, 3, 64), "x": rows(1, 3, 64), "index": first(1, 3), "scale": rows(1, 1, 64)[0]}
    arguments[argument] = rows(1, *((3, 64) if argument == "grad" else (1, 64)), misaligned=True)
    arguments["scale"] = arguments["scale"].view(1, 64)
    call = torch.ops.shiva_simt.gather_modulate_backward
    found = launches(simulated, lambda: call(*arguments.values(), EPS))
    assert found[2].startswith("gather_modulate_backward_kernel<float, 1, 2>")


@pytest.mark.parametrize(
    "D, options, wanted",
    [
        (4, {}, "uint4"),
        (6, {}, "uint2"),
        (5, {}, "unsigned int"),
        (4, {"misaligned": True}, "unsigned int"),
        (4, {"row_stride": 6}, "uint2"),
    ],
)
def test_rows_are_copied_in_the_widest_accesses_that_fit(simulated, D, options, wanted):
    x, kept = rows(2, 9, D, **options), first(2, 8)
    (found,) = launches(simulated, lambda: torch.ops.shiva_simt.token_gather(x, kept))
    assert found == f"token_gather_kernel<{wanted}> 2 x 256"


def test_no_launch_has_more_blocks_than_a_gpu_holds(simulated):
    x = rows(4097, 9, 1, torch.bfloat16)
    found = launches(simulated, lambda: torch.ops.shiva_simt.token_scatter(x, first(4097, 1), x[:, :1]))
    assert found == ["inverse_index_kernel<512> 4096 x 512", "token_scatter_kernel<short unsigned int> 4096 x 256"]


@pytest.mark.parametrize("N, blocks", [(4096, 2), (4097, 4)])
def test_an_index_is_inverted_in_chunks_of_4096_tokens(simulated, N, blocks):
    x = rows(2, N, 1)
    found = launches(simulated, lambda: torch.ops.shiva_simt.token_scatter(x, first(2, 3), x[:, :3]))
    assert found[0] == f"inverse_index_kernel<512> {blocks} x 512"


@pytest.mark.parametrize("D, width, options", [(64, 4, {}), (63, 1, {}), (64, 1, {"row_stride": 66})])
def test_scatter_residual_reads_vectors_where_it_can(simulated, D, width, options):
    base, update, gate = rows(2, 9, D, **options), rows(2, 8, D), torch.randn(2, D)
    found = launches(simulated, lambda: torch.ops.shiva_simt.scatter_residual(base, first(2, 8), update, gate))
    assert re.fullmatch(rf"scatter_residual_kernel<float, {width}> \d+ x 256", found[1])


@pytest.mark.parametrize("M, ranges", [(512, 1), (513, 2)])
def test_tokens_are_sorted_by_512_groups_a_block(simulated, M, ranges):
    x, position = rows(2, 9, 64), torch.zeros(2, 9, dtype=torch.int64)
    found = launches(simulated, lambda: torch.ops.shiva_simt.scatter_mean(x, position, M))
    assert found[0] == f"group_tokens_kernel {2 * ranges} x 512"
    found = launches(simulated, lambda: torch.ops.shiva_simt.scatter_mean_backward(rows(2, M, 64), position))
    assert found[0] == f"group_tokens_kernel {2 * ranges} x 512"


@pytest.mark.parametrize(
    "D, width, options",
    [(64, 4, {}), (62, 1, {}), (64, 1, {"row_stride": 66}), (64, 1, {"misaligned": True})],
)
def test_scatter_mean_takes_a_warp_for_a_row_and_reads_vectors_where_it_can(simulated, D, width, options):
    x, groups = rows(2, 9, D, **options), rows(2, 24, D, **options)
    position = torch.zeros(2, 9, dtype=torch.int64)
    found = launches(simulated, lambda: torch.ops.shiva_simt.scatter_mean(x, position, 24))
    assert found[1] == f"scatter_mean_kernel<float, {width}> 6 x 256"
    found = launches(simulated, lambda: torch.ops.shiva_simt.scatter_mean_backward(groups, position))
    assert found[1] == f"scatter_mean_backward_kernel<float, {width}> 3 x 256"


@pytest.mark.parametrize("T, blocks", [(1, 1), (64, 1), (65, 2), (32768, 512), (32769, 257), (65536, 512)])
def test_expert_dispatch_takes_a_block_for_128_choices_and_512_blocks_at_most(simulated, T, blocks):
    x, experts = torch.randn(T, 1), torch.zeros(T, 2, dtype=torch.int64)
    found = launches(simulated, lambda: torch.ops.shiva_simt.expert_dispatch(x, experts, 3))
    copies = f"expert_dispatch_kernel<unsigned int> {blocks} x 256"
    assert found == [f"expert_count_kernel {blocks} x 256", copies]


@pytest.mark.parametrize("D, access, width", [(64, "uint4", 4), (62, "uint2", 1), (61, "unsigned int", 1)])
def test_expert_rows_move_in_the_widest_accesses(simulated, D, access, width):
    simt, x = torch.ops.shiva_simt, torch.randn(40, D)
    experts, weight = torch.zeros(40, 2, dtype=torch.int64), torch.ones(40, 2)
    found = launches(simulated, lambda: simt.expert_dispatch(x, experts, 3))
    assert found[1] == f"expert_dispatch_kernel<{access}> 1 x 256"
    rows, place, _ = simt.expert_dispatch(x, experts, 3)
    pack = f"Pack<float, {width}> "
    for op, args in (("expert_combine", (rows, place, weight)), ("expert_dispatch_backward", (rows, place))):
        found = launches(simulated, lambda op=op, args=args: getattr(simt, op)(*args))
        assert found == [f"expert_combine_kernel<{pack}> 5 x 256"]
    found = launches(simulated, lambda: simt.expert_combine_backward(x, rows, place, weight))
    assert found == ["expert_source_kernel<float> 1 x 256", f"expert_combine_backward_kernel<{pack}> 10 x 256"]


def test_facility_location_takes_a_block_for_up_to_256_tokens(simulated):
    found = launches(simulated, lambda: torch.ops.shiva_simt.facility_location(torch.randn(3, 256, 256), 2))
    assert found == ["facility_block_kernel<float> 3 x 256"]


def test_facility_location_takes_two_launches_a_step_for_more_tokens(simulated):
    found = launches(simulated, lambda: torch.ops.shiva_simt.facility_location(torch.randn(2, 257, 257), 2))
    step = ["facility_gains_kernel<float> 65 x 256", "facility_take_kernel<float> 2 x 256"]
    assert found == ["facility_start_kernel<float> 3 x 256", *step, *step, "facility_list_kernel 2 x 256"]


BF16 = torch.bfloat16


@pytest.mark.parametrize(
    "H, D, dtype, options, wanted",
    [
        (64, 64, BF16, {}, r"router_score_kernel<MmaProduct<\w+, 64, 64, 5.*> 4 x 128"),
        (65, 64, BF16, {}, r"router_score_kernel<MmaProduct<\w+, 64, 128, 3.*> 4 x 256"),
        (128, 64, BF16, {}, r"router_score_kernel<MmaProduct<\w+, 64, 128, 3.*> 4 x 256"),
        (129, 64, BF16, {}, r"router_score_kernel<MmaProduct<\w+, 32, 256, 2.*> 6 x 256"),
        (256, 64, BF16, {}, r"router_score_kernel<MmaProduct<\w+, 32, 256, 2.*> 6 x 256"),
        (257, 64, BF16, {}, r"router_score_wide_kernel<\w+> 4 x 256"),
        (64, 60, BF16, {}, r"router_score_kernel<SimtProduct<\w+.*> 4 x 128"),
        (64, 64, BF16, {"misaligned": True}, r"router_score_kernel<SimtProduct<\w+.*> 4 x 128"),
        (64, 64, torch.float32, {}, r"router_score_kernel<SimtProduct<float.*> 4 x 128"),
        (65, 64, torch.float32, {}, r"router_score_wide_kernel<float> 4 x 256"),
    ],
)
def test_router_score_takes_the_smallest_tile_that_holds_the_hidden_layer(simulated, H, D, dtype, options, wanted):
    x, w_in = rows(2, 70, D, dtype, **options), rows(1, H, D, dtype)[0]
    context, small = torch.randn(2, H), torch.randn(H)
    call = torch.ops.shiva_simt.router_score
    found = launches(simulated, lambda: call(x, context, w_in, small, small, small, EPS))
    assert re.fullmatch(wanted, found[-1]), found
    grad, call = torch.randn(2, 70), torch.ops.shiva_simt.router_score_backward
    found = launches(simulated, lambda: call(grad, x, context, w_in, small, small, small, EPS))
    hidden = wanted.replace("score_wide", "wide_backward").replace("router_score", "router_hidden_backward")
    assert any(re.fullmatch(hidden, launch) for launch in found), found


def test_the_router_keeps_no_projection_on_a_gpu(simulated):
    x, w_in, context, small = torch.randn(2, 9, 16), torch.randn(8, 16), torch.randn(2, 8), torch.randn(8)
    arguments = (x, context, w_in, small, small, small, EPS)
    score, projection = torch.ops.shiva_simt.router_score_and_projection(*arguments)
    assert torch.equal(score, torch.ops.shiva_simt.router_score(*arguments)) and projection.shape == (0,)
    backward, grad = torch.ops.shiva_simt.router_score_backward, torch.randn(2, 9)
    for got, wanted in zip(backward(grad, *arguments, projection), backward(grad, *arguments), strict=True):
        assert torch.equal(got, wanted)
    with pytest.raises(RuntimeError, match=r"projection must have shape \[0\], got \[2, 9, 8\]"):
        backward(grad, *arguments, torch.randn(2, 9, 8))
