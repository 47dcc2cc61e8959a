"""Token selection on PixArtTransformer2DModel, against its blocks run by hand on the kept tokens, and its pipeline."""

import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import shiva_ext
from shiva_ext import hooks
from shiva_ext.evaluation.flops import pixart_forward_flops
from shiva_ext.models import adapter_for
from shiva_ext.selection import LargestNormSelector, RandomSelector, RatioTable, ShivaRouter, get_estimator
from shiva_ext.training.stages import run_student, run_teacher

LAYERS, WIDTH, SIZE, TEXT, PROMPT = 4, 64, 8, 5, 24
N = (SIZE // 2) ** 2
CONFIGS = {
    "sigma": {},
    "alpha, with its size": dict(use_additional_conditions=True, attention_head_dim=96, cross_attention_dim=96),
    "two heads": dict(num_attention_heads=2, attention_head_dim=32),
    "no projection of the prompt": dict(caption_channels=None, cross_attention_dim=PROMPT),
}


def make_model(**overrides) -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    config = dict(
        num_attention_heads=1, attention_head_dim=WIDTH, in_channels=4, out_channels=8, num_layers=LAYERS,
        cross_attention_dim=WIDTH, caption_channels=PROMPT, sample_size=SIZE, use_additional_conditions=False,
    )  # fmt: skip
    model = PixArtTransformer2DModel(**{**config, **overrides})
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3))
    return model.eval()


def make_inputs(batch: int = 2, size: int = SIZE, sigma: float = 0.7, additional: bool = False) -> dict:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(batch, TEXT)
    mask[0, 3:] = 0
    conditions = {"resolution": torch.tensor([[64.0, 64.0]] * batch), "aspect_ratio": torch.ones(batch, 1)}
    return dict(
        hidden_states=torch.randn(batch, 4, size, size, generator=generator),
        encoder_hidden_states=torch.randn(batch, TEXT, PROMPT, generator=generator),
        encoder_attention_mask=mask,
        timestep=torch.full((batch,), int(1000 * sigma)),
        added_cond_kwargs=conditions if additional else {"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )


def table() -> RatioTable:
    levels = torch.linspace(0.1, 0.9, 5)
    ratios = 0.2 + 0.7 * torch.rand(5, LAYERS, generator=torch.Generator().manual_seed(3))
    ratios[:, 0] = 1
    return RatioTable(levels, ratios)


def make_artifact(model, table=None, **options):
    torch.manual_seed(2)
    router = ShivaRouter(**adapter_for(model).dims(model), hidden=16).eval().requires_grad_(False)
    table = table or RatioTable.fixed(0.6, LAYERS)
    return shiva_ext.ShivaArtifact("PixArtTransformer2DModel", router, table, **options)


class OnKept(nn.Module):
    """A block that runs on given tokens alone, written with indexing."""

    def __init__(self, block, kept):
        super().__init__()
        self.block, self.kept = block, kept

    def forward(self, hidden_states, **others):
        rows = torch.arange(len(hidden_states))[:, None]
        result = hidden_states.clone()
        result[rows, self.kept] = self.block(hidden_states[rows, self.kept], **others)
        return result


@torch.no_grad()
def run_by_hand(model, kept, inputs):
    for layer, index in kept.items():
        model.transformer_blocks[layer] = OnKept(model.transformer_blocks[layer], index)
    return model(**inputs)[0]


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_each_block_runs_on_the_kept_tokens_alone(name):
    model, inputs = make_model(**CONFIGS[name]), make_inputs(additional="alpha" in name)
    source = make_artifact(model, table())
    dense = model(**inputs)[0]
    with shiva_ext.enable(model, source) as handle:
        handle.record()
        output = model(**inputs)[0]
        kept = handle.records[0]["kept"]
    assert {layer: index.shape[1] for layer, index in kept.items()} == {
        layer: k for layer, k in enumerate(source.table.tokens(0.7, N)) if layer
    }
    torch.testing.assert_close(output, run_by_hand(make_model(**CONFIGS[name]), kept, inputs), rtol=1e-4, atol=1e-4)
    assert (output - dense).abs().max() > 0.05
    assert torch.equal(model(**inputs)[0], dense)  # disabled again


@pytest.mark.parametrize("options", [{}, {"share_selection": True}])
@torch.no_grad()
def test_a_ratio_of_one_is_the_dense_model(options):
    model, inputs = make_model(), make_inputs()
    dense = model(**inputs)[0]
    with shiva_ext.enable(model, make_artifact(model), ratio=1.0, **options):
        assert torch.equal(model(**inputs)[0], dense)


@pytest.mark.parametrize("selector", [RandomSelector, LargestNormSelector])
@torch.no_grad()
def test_selectors_without_training_work_too(selector):
    model, inputs = make_model(), make_inputs(batch=3, size=12)
    with shiva_ext.enable(model, selector(0.5)) as handle:
        handle.record()
        assert model(**inputs)[0].isfinite().all()
    assert all(index.shape == (3, 18) for index in handle.records[0]["kept"].values())


@torch.no_grad()
def test_masked_tokens_of_the_prompt_do_not_move_the_selection():
    model, inputs = make_model(), make_inputs()
    adapter = adapter_for(model)
    before = adapter.conditioning(model, inputs).pooled_embedding
    changed = inputs["encoder_hidden_states"].clone()
    changed[0, 3:] += 100
    after = adapter.conditioning(model, {**inputs, "encoder_hidden_states": changed}).pooled_embedding
    assert torch.equal(before, after)
    bias = (1 - inputs["encoder_attention_mask"]).unsqueeze(1) * -10000.0
    as_bias = adapter.conditioning(model, {**inputs, "encoder_attention_mask": bias}).pooled_embedding
    torch.testing.assert_close(as_bias, before)
    everything = adapter.conditioning(model, {**inputs, "encoder_attention_mask": None}).pooled_embedding
    assert not torch.equal(everything[0], before[0]) and torch.allclose(everything[1], before[1], atol=1e-6)


def test_a_mask_of_image_tokens_is_refused():
    model = make_model()
    with shiva_ext.enable(model, make_artifact(model)), pytest.raises(ValueError, match="attention_mask masks image"):
        model(**make_inputs(), attention_mask=torch.ones(2, N))


@pytest.mark.parametrize("estimator", ["counterfactual", "residual"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_router_and_ratios(estimator, checkpointing):
    model = make_model()
    source = make_artifact(model)
    source.router.requires_grad_(True)
    if checkpointing:
        model.enable_gradient_checkpointing()
    state = hooks.SelectionState(source, adapter_for(model))
    hooks.attach(model, state)
    inputs = {name: value for name, value in make_inputs().items() if name != "return_dict"}
    teacher = run_teacher(model, state, **inputs)
    ratios = torch.tensor([1.0, 0.6, 0.5, 0.7], requires_grad=True)
    output, student = run_student(model, state, get_estimator(estimator), ratios, teacher, **inputs)
    assert {layer: kept.shape[1] for layer, kept in student.kept.items()} == {1: 9, 2: 8, 3: 11}
    (output - teacher.output).square().mean().backward()
    assert (ratios.grad[1:] != 0).all()
    assert all(p.grad is not None and p.grad.any() for p in source.router.parameters())


@torch.no_grad()
def test_compiled_equals_eager_in_one_graph_a_row():
    torch.compiler.reset()
    model = make_model(num_layers=3)
    source = make_artifact(model, RatioTable([0.2, 0.8], torch.tensor([[1, 0.5, 0.75], [1, 0.25, 0.5]])))
    handle = shiva_ext.enable(model, source)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
    for _ in range(2):
        for sigma in (0.1, 0.9):
            handle.at(sigma)
            assert torch.equal(compiled(**make_inputs(sigma=sigma))[0], model(**make_inputs(sigma=sigma))[0])
    assert counter.frame_count == 2
    torch.compiler.reset()


def test_the_pipeline_runs_and_is_left_as_it_was():
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, layers_per_block=1).eval()
    pipe = PixArtSigmaPipeline(None, None, vae, make_model(), DPMSolverMultistepScheduler())
    pipe.set_progress_bar_config(disable=True)

    def generate():
        torch.manual_seed(5)
        prompts = torch.randn(2, TEXT, PROMPT)
        masks = torch.ones(2, TEXT)
        return pipe(
            prompt=None, negative_prompt=None, prompt_embeds=prompts, prompt_attention_mask=masks,
            negative_prompt_embeds=torch.zeros_like(prompts), negative_prompt_attention_mask=masks,
            num_inference_steps=4, guidance_scale=3.0, height=8, width=8, use_resolution_binning=False,
            generator=torch.Generator().manual_seed(0), output_type="latent",
        )[0]  # fmt: skip

    dense = generate()
    handle = shiva_ext.enable(pipe, make_artifact(pipe.transformer, table()), batched_guidance=True).record()
    pruned = generate()
    assert pruned.shape == dense.shape and not torch.equal(pruned, dense) and pruned.isfinite().all()
    assert len(handle.records) == 4
    for record in handle.records:
        assert all(torch.equal(kept[:2], kept[2:]) for kept in record["kept"].values())  # of both guidance halves
    shiva_ext.disable(pipe)
    assert torch.equal(generate(), dense)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_operations_equal_pytorchs_counter(name):
    model, inputs = make_model(**CONFIGS[name]), make_inputs(batch=1, additional="alpha" in name)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs)
    assert pixart_forward_flops(model, TEXT) == counter.get_total_flops()
    kept = {1: torch.arange(6)[None], 2: torch.arange(9)[None]}
    counts = {layer: index.shape[1] for layer, index in kept.items()}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run_by_hand(model, kept, inputs)
    assert pixart_forward_flops(model, TEXT, kept=counts) == counter.get_total_flops()
    routed = pixart_forward_flops(model, TEXT, kept=counts, router_width=16)
    width = model.inner_dim
    assert routed - pixart_forward_flops(model, TEXT, kept=counts) == 2 * 2 * 16 * N * (width + 1)
    with pytest.raises(ValueError, match="layer 9"):
        pixart_forward_flops(model, TEXT, kept={9: 1})


def test_summary_counts_it():
    model = make_model()
    shiva_ext.enable(model, make_artifact(model), ratio=0.5)
    summary = shiva_ext.summary(model, steps=3, text_tokens=TEXT)
    assert summary.mean_ratio == 0.5 and summary.flop_speedup > 1.3
    assert summary.dense_flops == pixart_forward_flops(model, TEXT)
