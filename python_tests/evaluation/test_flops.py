"""The analytic count of floating-point operations against a count by hand and against PyTorch's own counter."""

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shiva_ext.evaluation.flops import attention_flops, sd3_forward_flops

SMALL = dict(
    sample_size=8, patch_size=2, in_channels=3, out_channels=3, num_layers=3, num_attention_heads=2,
    attention_head_dim=8, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=20,
    pos_embed_max_size=8, qk_norm="rms_norm",
)  # fmt: skip


def counted(model, batch, text_tokens, size=8):
    config = model.config
    arguments = (
        torch.zeros(batch, config.in_channels, size, size),
        torch.zeros(batch, text_tokens, config.joint_attention_dim),
        torch.zeros(batch, config.pooled_projection_dim),
        torch.zeros(batch),
    )
    # The math back end spells attention out as matrix products, which the counter knows on every device.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*arguments)
    return counter.get_total_flops()


def test_attention_and_mlp_may_process_different_tokens():
    """A linear layer of the MLP costs two operations a weight and token."""
    model = SD3Transformer2DModel(**SMALL)
    mlp = sum(p.numel() for p in model.transformer_blocks[1].ff.parameters() if p.ndim == 2)
    both = sd3_forward_flops(model, 5, kept={1: 8})
    assert sd3_forward_flops(model, 5, kept={1: (8, 8)}) == both
    assert sd3_forward_flops(model, 5, kept={1: (8, 16)}) == both + 2 * mlp * 8
    assert sd3_forward_flops(model, 5, kept={1: (16, 16)}) == sd3_forward_flops(model, 5)
    with pytest.raises(ValueError, match="0..16"):
        sd3_forward_flops(model, 5, kept={1: (8, 17)})


@pytest.mark.parametrize("text_tokens", [1, 5])
@pytest.mark.parametrize(
    "overrides", [{}, {"dual_attention_layers": (0, 2)}, {"num_layers": 1}, {"out_channels": None}]
)
def test_dense_count_equals_pytorchs_counter(overrides, text_tokens):
    model = SD3Transformer2DModel(**{**SMALL, **overrides})
    assert sd3_forward_flops(model, text_tokens) == counted(model, 1, text_tokens)
    assert 3 * sd3_forward_flops(model, text_tokens) == counted(model, 3, text_tokens)


def test_other_resolutions_are_counted_by_their_tokens():
    model = SD3Transformer2DModel(**SMALL)
    assert sd3_forward_flops(model, 5, image_tokens=36) == counted(model, 1, 5, size=12)


def test_pruned_blocks_equal_pytorchs_counter_on_shortened_blocks():
    model, k = SD3Transformer2DModel(**SMALL), 6

    class OnFewTokens(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block, self.context_pre_only = block, block.context_pre_only

        def forward(self, hidden_states, **others):
            text, image = self.block(hidden_states=hidden_states[:, :k], **others)
            return text, torch.cat([image, hidden_states[:, k:]], 1)

    for layer in (1, 2):
        model.transformer_blocks[layer] = OnFewTokens(model.transformer_blocks[layer])
    assert sd3_forward_flops(model, 5, kept={1: k, 2: k}) == counted(model, 1, 5)


def test_attention_equals_a_count_by_hand():
    # 3 image and 2 text tokens of width 4: q, k, v for 5 rows, outputs for 5 (or 3) rows; scores and their use.
    multiply_adds = 3 * 5 * 16 + 5 * 16 + 5 * 5 * 4 + 5 * 5 * 4
    assert attention_flops(4, 3, 2) == 2 * multiply_adds
    assert attention_flops(4, 3, 2, text_output=False) == 2 * (multiply_adds - 2 * 16)


def test_one_block_model_equals_a_count_by_hand():
    model = SD3Transformer2DModel(**{**SMALL, "num_layers": 1})
    N, T, D = 16, 5, 16
    embed = N * 12 * D + (256 * D + D * D) + (20 * D + D * D) + T * 12 * 16
    modulation = 6 * D * D + 2 * D * D + 2 * D * D  # image stream, text stream of a last block, output norm
    attention = 3 * (N + T) * D * D + N * D * D + 2 * (N + T) ** 2 * D
    mlp = N * D * 4 * D * 2
    assert sd3_forward_flops(model, T) == 2 * (embed + modulation + attention + mlp + N * D * 12)


def test_router_reads_every_token_of_each_pruned_layer():
    model = SD3Transformer2DModel(**SMALL)
    extra = sd3_forward_flops(model, 5, kept={1: 4, 2: 4}, router_width=10) - sd3_forward_flops(
        model, 5, kept={1: 4, 2: 4}
    )
    assert extra == 2 * (2 * 16 * 16 * 10 + 2 * 16 * 10)
    assert sd3_forward_flops(model, 5, router_width=10) == sd3_forward_flops(model, 5)


@pytest.mark.parametrize("kept", [{3: 4}, {-1: 4}, {1: 17}, {1: -1}])
def test_impossible_kept_counts_are_refused(kept):
    with pytest.raises(ValueError, match="kept must map layers 0..2 to 0..16 tokens"):
        sd3_forward_flops(SD3Transformer2DModel(**SMALL), 5, kept=kept)


def test_sd35_medium_allows_the_savings_that_its_tokens_promise():
    with torch.device("meta"):
        model = SD3Transformer2DModel(
            num_layers=24, num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536,
            pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
        )  # fmt: skip
    dense = sd3_forward_flops(model, 333)
    assert dense == pytest.approx(11.8e12, rel=0.05)  # the paper's dense figure, table 1

    def speed_up(ratio):
        return dense / sd3_forward_flops(model, 333, kept={layer: int(4096 * ratio) for layer in range(1, 24)})

    assert speed_up(0.8) == pytest.approx(1.31, abs=0.02)
    assert speed_up(0.6) == pytest.approx(1.79, abs=0.05)
