"""Sizes at which a kernel changes its form: one block a row, several blocks a row, other tile counts."""

import pytest
import torch

from shiva_ext import reference

from .device import place

FORMS = [256, 257, 1024, 1025, 4096, 4097, 16384, 16385, 32768, 32769, 50000]


@pytest.mark.parametrize("content", ["random", "ties", "digits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("N", FORMS)
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
