"""Token selection on FluxTransformer2DModel, against its blocks run by hand on the kept tokens, and its pipeline."""

import warnings

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import shiva_ext
from shiva_ext import hooks
from shiva_ext.evaluation.flops import flux_forward_flops
from shiva_ext.models import adapter_for
from shiva_ext.selection import LargestNormSelector, RandomSelector, RatioTable, ShivaRouter, get_estimator
from shiva_ext.training.stages import run_student, run_teacher

DOUBLE, SINGLE, SIDE, TEXT, CHANNELS, PROMPT, POOLED = 2, 3, 4, 3, 16, 24, 20
LAYERS, N = DOUBLE + SINGLE, SIDE**2
CONFIGS = {
    "dev": dict(guidance_embeds=True),
    "schnell": {},
    "no double blocks pruned": dict(num_layers=1),
    "double blocks alone": dict(num_layers=3, num_single_layers=0),
}


def make_model(**overrides) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    config = dict(
        patch_size=1, in_channels=CHANNELS, num_layers=DOUBLE, num_single_layers=SINGLE, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=PROMPT, pooled_projection_dim=POOLED, guidance_embeds=False,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    model = FluxTransformer2DModel(**{**config, **overrides})
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3))
    return model.eval()


def make_inputs(model, batch: int = 2, side: int = SIDE, sigma: float = 0.7) -> dict:
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    positions = torch.stack([torch.zeros(side * side), rows.flatten(), columns.flatten()], dim=1)
    return dict(
        hidden_states=random(batch, side * side, CHANNELS),
        encoder_hidden_states=random(batch, TEXT, PROMPT),
        pooled_projections=random(batch, POOLED),
        timestep=torch.full((batch,), sigma),
        img_ids=positions,
        txt_ids=torch.zeros(TEXT, 3),
        guidance=torch.full((batch,), 3.5) if model.config.guidance_embeds else None,
        return_dict=False,
    )


def table(layers: int = LAYERS) -> RatioTable:
    ratios = 0.2 + 0.7 * torch.rand(5, layers, generator=torch.Generator().manual_seed(3))
    ratios[:, 0] = 1
    return RatioTable(torch.linspace(0.1, 0.9, 5), ratios)


def make_artifact(model, schedule=None, **options):
    torch.manual_seed(2)
    dims = adapter_for(model).dims(model)
    router = ShivaRouter(**dims, hidden=16).eval().requires_grad_(False)
    schedule = schedule or RatioTable.fixed(0.6, dims["num_layers"])
    return shiva_ext.ShivaArtifact("FluxTransformer2DModel", router, schedule, **options)


class OnKept(nn.Module):
    """A block that runs on given tokens alone, one sample after the other, written with indexing."""

    def __init__(self, block, kept):
        super().__init__()
        self.block, self.kept = block, kept

    def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, **others):
        texts, images = [], []
        for b, index in enumerate(self.kept):
            rows = torch.cat([torch.arange(TEXT), TEXT + index])
            text, image = self.block(
                hidden_states=hidden_states[b : b + 1, index],
                encoder_hidden_states=encoder_hidden_states[b : b + 1],
                temb=temb[b : b + 1],
                image_rotary_emb=tuple(part[rows] for part in image_rotary_emb),
                **others,
            )
            whole = hidden_states[b : b + 1].clone()
            whole[:, index] = image
            texts.append(text)
            images.append(whole)
        return torch.cat(texts), torch.cat(images)


@torch.no_grad()
def run_by_hand(model, kept, inputs):
    for layer, index in kept.items():
        blocks = model.transformer_blocks
        place = layer if layer < len(blocks) else layer - len(blocks)
        blocks = blocks if layer < len(blocks) else model.single_transformer_blocks
        blocks[place] = OnKept(blocks[place], index)
    return model(**inputs)[0]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_each_block_runs_on_the_kept_tokens_alone_at_their_own_positions(name, batch):
    model = make_model(**CONFIGS[name])
    inputs = make_inputs(model, batch)
    source = make_artifact(model, table(len(adapter_for(model).blocks(model))))
    dense = model(**inputs)[0]
    with shiva_ext.enable(model, source, tile=1) as handle:
        handle.record()
        output = model(**inputs)[0]
        kept = handle.records[0]["kept"]
    assert {layer: index.shape[1] for layer, index in kept.items()} == {
        layer: k for layer, k in enumerate(source.table.tokens(0.7, N)) if layer
    }
    assert batch == 1 or any(not torch.equal(*index) for index in kept.values())
    torch.testing.assert_close(output, run_by_hand(make_model(**CONFIGS[name]), kept, inputs), rtol=1e-4, atol=1e-4)
    assert (output - dense).abs().max() > 0.05
    assert torch.equal(model(**inputs)[0], dense)  # disabled again


@torch.no_grad()
def test_positions_matter_to_a_pruned_block():
    model = make_model()
    inputs = make_inputs(model)
    with shiva_ext.enable(model, make_artifact(model)):
        output = model(**inputs)[0]
        moved = model(**{**inputs, "img_ids": inputs["img_ids"].flip(0)})[0]
    assert (output - moved).abs().max() > 1e-3


@torch.no_grad()
def test_samples_of_a_batch_do_not_touch_each_other():
    model = make_model()
    inputs = make_inputs(model, batch=3)
    alone = {
        name: v[1:2] if torch.is_tensor(v) and len(v) == 3 and "ids" not in name else v for name, v in inputs.items()
    }
    with shiva_ext.enable(model, make_artifact(model)):
        torch.testing.assert_close(model(**inputs)[0][1:2], model(**alone)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"share_selection": True}])
@torch.no_grad()
def test_a_ratio_of_one_is_the_dense_model(options):
    model = make_model()
    inputs = make_inputs(model)
    dense = model(**inputs)[0]
    with shiva_ext.enable(model, make_artifact(model), ratio=1.0, **options):
        assert torch.equal(model(**inputs)[0], dense)


@pytest.mark.parametrize("selector", [RandomSelector, LargestNormSelector])
@torch.no_grad()
def test_selectors_without_training_work_too(selector):
    model = make_model()
    with shiva_ext.enable(model, selector(0.5)) as handle:
        handle.record()
        assert model(**make_inputs(model, batch=3, side=6))[0].isfinite().all()
    assert all(index.shape == (3, 18) for index in handle.records[0]["kept"].values())
    assert len(handle.records[0]["kept"]) == LAYERS - 1


@torch.no_grad()
def test_guidance_reaches_the_router():
    model = make_model(guidance_embeds=True)
    inputs, adapter = make_inputs(model), adapter_for(model)
    weak = adapter.conditioning(model, inputs).timestep_embedding
    strong = adapter.conditioning(model, {**inputs, "guidance": 2 * inputs["guidance"]}).timestep_embedding
    assert not torch.equal(weak, strong)
    assert torch.allclose(adapter.conditioning(model, inputs).timestep, torch.full((2,), 700.0))


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
    inputs = {name: value for name, value in make_inputs(model).items() if name != "return_dict"}
    teacher = run_teacher(model, state, **inputs)
    ratios = torch.tensor([1.0, 0.6, 0.5, 0.7, 0.4], requires_grad=True)
    output, student = run_student(model, state, get_estimator(estimator), ratios, teacher, **inputs)
    assert {layer: kept.shape[1] for layer, kept in student.kept.items()} == {1: 9, 2: 8, 3: 11, 4: 6}
    (output - teacher.output).square().mean().backward()
    assert (ratios.grad[1:] != 0).all()
    assert all(p.grad is not None and p.grad.any() for p in source.router.parameters())


@torch.no_grad()
def test_compiled_equals_eager_in_one_graph_a_row():
    torch.compiler.reset()
    model = make_model(num_layers=1, num_single_layers=1)
    source = make_artifact(model, RatioTable([0.2, 0.8], torch.tensor([[1, 0.5], [1, 0.25]])))
    handle = shiva_ext.enable(model, source)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
    for _ in range(2):
        for sigma in (0.1, 0.9):
            handle.at(sigma)
            inputs = make_inputs(model, sigma=sigma)
            assert torch.equal(compiled(**inputs)[0], model(**inputs)[0])
    assert counter.frame_count == 2
    torch.compiler.reset()


def test_the_pipeline_runs_and_is_left_as_it_was():
    model = make_model(guidance_embeds=True)
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, model)
    pipe.set_progress_bar_config(disable=True)

    def generate():
        torch.manual_seed(5)
        return pipe(
            prompt_embeds=torch.randn(2, TEXT, PROMPT), pooled_prompt_embeds=torch.randn(2, POOLED),
            num_inference_steps=4, height=64, width=64, generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )[0]  # fmt: skip

    dense = generate()
    with warnings.catch_warnings():  # it guides inside the model: nothing to ask the user for
        warnings.simplefilter("error")
        handle = shiva_ext.enable(pipe, make_artifact(model, table())).record()
    pruned = generate()
    assert pruned.shape == dense.shape and not torch.equal(pruned, dense) and pruned.isfinite().all()
    levels = [round(record["timestep"] / 1000, 3) for record in handle.records]
    assert levels == [round(float(sigma), 3) for sigma in pipe.scheduler.sigmas[:-1]]
    shiva_ext.disable(pipe)
    assert torch.equal(generate(), dense)


def test_an_ip_adapter_is_refused_for_batches():
    model = make_model()
    with shiva_ext.enable(model, make_artifact(model)), pytest.raises(ValueError, match="one image at a time"):
        model(**make_inputs(model), joint_attention_kwargs={"ip_hidden_states": [torch.zeros(2, 1, 4)]})


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_operations_equal_pytorchs_counter(name):
    model = make_model(**CONFIGS[name])
    inputs = make_inputs(model, batch=1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs)
    assert flux_forward_flops(model, TEXT, N) == counter.get_total_flops()
    kept = {1: torch.arange(6)[None], 2: torch.arange(9)[None]}
    counts = {layer: index.shape[1] for layer, index in kept.items()}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run_by_hand(model, kept, inputs)
    assert flux_forward_flops(model, TEXT, N, kept=counts) == counter.get_total_flops()
    with pytest.raises(ValueError, match="layer 9"):
        flux_forward_flops(model, TEXT, kept={9: 1})


def test_summary_counts_it():
    model = make_model()
    shiva_ext.enable(model, make_artifact(model), ratio=0.5)
    summary = shiva_ext.summary(model, num_tokens=N, steps=3, text_tokens=TEXT)
    assert summary.mean_ratio == 0.5 and summary.flop_speedup > 1.2
    assert summary.dense_flops == flux_forward_flops(model, TEXT, N)
