"""Batched classifier-free guidance: both halves keep the same tokens, Shiva-DiT (arXiv 2602.05605), eq. 32."""

import pytest
import torch

import shiva_ext

from .tiny import LAYERS, N, make_artifact, make_inputs, make_model, run_by_hand


class Given:
    """Scores that do not depend on the tokens, the same for every layer."""

    def __init__(self, scores, ratio=0.5):
        self.given, self.ratio_ = scores, ratio

    def ratios(self, sigma):
        return (1.0,) + (self.ratio_,) * (LAYERS - 1)

    def scores(self, layer, x, sigma, conditioning):
        return self.given[: len(x)]


@torch.no_grad()
def kept_by(model, source, batch, **options):
    with shiva_ext.enable(model, source, **options) as handle:
        handle.record()
        output = model(**make_inputs(batch))[0]
    return handle.records[0]["kept"], output


@pytest.mark.parametrize("batch", [2, 6])
def test_both_halves_keep_what_either_of_them_needs_most(batch, model):
    scores = torch.randn(batch, N)
    kept, _ = kept_by(model, Given(scores), batch, batched_guidance=True)
    unconditional, conditional = scores.chunk(2)
    wanted = torch.maximum(unconditional, conditional).topk(N // 2).indices.sort().values
    assert list(kept) == [1, 2, 3]
    for index in kept.values():
        assert torch.equal(index[: batch // 2], wanted)
        assert torch.equal(index[batch // 2 :], wanted)


def test_a_token_that_one_half_alone_needs_is_kept_in_both(model):
    scores = torch.zeros(2, N)
    scores[0, 15], scores[1, 9] = 1, 1  # nobody else counts: a sum or a mean would do as well
    scores[0, 9] = -9  # but here only the maximum does
    kept, _ = kept_by(model, Given(scores, 2 / N), 2, batched_guidance=True)
    assert kept[1].tolist() == [[9, 15], [9, 15]]


def test_without_guidance_each_sample_keeps_its_own(model):
    scores = torch.randn(4, N)
    kept, _ = kept_by(model, Given(scores), 4)
    assert torch.equal(kept[1], scores.topk(N // 2).indices.sort().values)


def test_an_odd_batch_under_guidance_is_an_error_that_says_what_to_do(model, artifact):
    with pytest.raises(ValueError, match="batch has 3 samples, wanted an even number; enable with batched_guidance=F"):
        kept_by(model, artifact, 3, batched_guidance=True)


def test_the_guided_model_runs_as_by_hand(model, artifact):
    kept, output = kept_by(model, artifact, 4, batched_guidance=True)
    assert torch.equal(kept[2][:2], kept[2][2:])
    wanted, _ = run_by_hand(make_model(), kept, make_inputs(4))
    torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-4)


def test_a_call_with_skipped_layers_is_not_a_pair(model):
    inputs = make_inputs(2) | {"skip_layers": [2]}
    with shiva_ext.enable(model, make_artifact(), batched_guidance=True) as handle:
        handle.record()
        model(**inputs)
    kept = handle.records[0]["kept"]
    assert list(kept) == [1, 3]
    assert not torch.equal(kept[1][0], kept[1][1])
