"""Sizes at which a kernel changes its form: one block a row, several blocks a row, other tile counts."""

import pytest
import torch

from shiva_ext import reference

from .cases import OPS, Size
from .device import place
from .matrix import complaints

LENGTHS = [256, 257, 1024, 1025, 4096, 4097, 16384, 16385, 32768, 32769, 50000]


@pytest.mark.parametrize("content", ["random", "ties", "digits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("N", LENGTHS)
def test_topk_select_of_long_rows(N, dtype, content):
    generator = torch.Generator().manual_seed(N)
    scores = torch.randn(2, N, generator=generator, dtype=torch.float64)
    if content == "ties":
        scores = (2 * scores).round()
    if content == "digits":  # keys that differ in their last digits only, so that every digit decides
        scores = 1 + torch.randint(0, 5, (2, N), generator=generator) * torch.finfo(dtype).eps
    scores[0, N // 3] = torch.nan
    scores[1, N // 2], scores[1, N // 5] = torch.inf, -torch.inf
    scores = scores.to(dtype)
    for k in (1, N // 2, N - 1) if N < 5000 else (int(0.6 * N),):
        kept, rejected = (t.cpu() for t in torch.ops.shiva.topk_select(place(scores), k))
        wanted = reference.topk_select(scores, k)
        assert torch.equal(kept, wanted[0]) and torch.equal(rejected, wanted[1])


# Where the CUDA kernels of an op take another form: lanes, warps or passes to a row, columns of a tile, sorted or not.
FORMS = {
    "gather_modulate": {
        "a block to a row": Size(B=2, N=3, k=2, D=1536, H=1),
        "a block to a row, no vectors": Size(B=2, N=3, k=2, D=1025, H=1),
        "several passes": Size(B=1, N=2, k=1, D=16392, H=1),
        "several passes, no vectors": Size(B=1, N=2, k=1, D=16385, H=1),
    },
    "router_score": {
        "no channels": Size(B=2, N=5, k=1, D=0, H=8),
        "stages go round": Size(B=2, N=70, k=1, D=264, H=64),
        "128 columns": Size(B=2, N=37, k=1, D=200, H=104),
        "256 columns": Size(B=1, N=37, k=1, D=72, H=200),
        "no tile holds the columns": Size(B=2, N=37, k=1, D=72, H=300),
    },
    "soft_rank": {
        "sorted": Size(B=2, N=520, k=1, D=1, H=1),
        "merged": Size(B=1, N=1100, k=1, D=1, H=1),
        "merged twice": Size(B=1, N=2049, k=1, D=1, H=1),
    },
    "token_gather of a table": {"several chunks": Size(B=2, N=4100, k=70, D=3, H=1)},
    "token_scatter": {"several chunks": Size(B=2, N=4100, k=4099, D=1, H=1)},
    "residual_gate": {"long rows": Size(B=2, N=5, k=3, D=1544, H=1)},
    "counterfactual_scatter": {"long rows": Size(B=2, N=5, k=3, D=1544, H=1)},
    "scatter_residual": {"long rows": Size(B=2, N=40, k=33, D=1544, H=1)},
    "scatter_mean": {
        "several ranges of groups": Size(B=2, N=1500, k=1100, D=4, H=1),
        "one large group": Size(B=2, N=1500, k=1, D=5, H=1),
        "long rows": Size(B=2, N=40, k=13, D=1544, H=1),
    },
    # 128 choices a turn, of 3 a token; 512 blocks at most.
    **{
        name: {
            "one turn": Size(B=1, N=42, k=1, D=8, H=1),
            "a turn and a bit": Size(B=1, N=43, k=1, D=9, H=1),
            "several turns a block": Size(B=1, N=22000, k=1, D=1, H=1),
            "long rows": Size(B=2, N=5, k=1, D=1544, H=1),
        }
        for name in ("expert_dispatch", "expert_dispatch with a capacity", "expert_combine")
    },
    "ema_scan": {  # chunks of 64 tokens, blocks of 128 channels
        "one chunk": Size(B=2, N=64, k=1, D=128, H=1),
        "a chunk and a bit": Size(B=2, N=65, k=1, D=129, H=1),
        "many chunks": Size(B=1, N=1100, k=1, D=5, H=1),
        "many tiles": Size(B=1, N=70, k=1, D=600, H=1),
    },
    "facility_location": {
        "one block": Size(B=1, N=256, k=3, D=1, H=1),
        **{f"{N} tokens": Size(B=1, N=N, k=3, D=1, H=1) for N in (257, 288, 300, 320, 513, 600)},
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("key", "form"), [(key, form) for key, forms in FORMS.items() for form in forms])
def test_other_forms_equal_the_reference(key, form, dtype):
    content = "spread" if key == "soft_rank" else "random"
    for backward in (False, True) if OPS[key].leaves else (False,):
        found = complaints(key, dtype, content, "contiguous", backward, {form: FORMS[key][form]})
        assert not found, "\n".join(found)
