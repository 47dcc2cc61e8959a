"""What every family must do, on DiT, Sana, Qwen-Image and Wan; SD3, Flux and PixArt have files of their own."""

import warnings

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    SanaPipeline,
    SCMScheduler,
    WanPipeline,
)
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import shiva_ext
from shiva_ext import hooks
from shiva_ext.models import adapter_for
from shiva_ext.models.prompt import mean_token
from shiva_ext.selection import LargestNormSelector, RandomSelector, RatioTable, get_estimator
from shiva_ext.training.stages import run_student, run_teacher

from .families import FAMILIES, PROMPT, TEXT, make_artifact, run_by_hand, table, wan_inputs

CASES = [(name, config) for name, family in FAMILIES.items() for config in family.configs]
every_case = pytest.mark.parametrize("name, config", CASES, ids=[f"{n} {c}".strip() for n, c in CASES])
every_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch.compiler.reset()


def pruned(model, source, inputs, **options):
    """The output and the kept tokens of one call."""
    with shiva_ext.enable(model, source, tile=1, **options) as handle:
        handle.record()
        return model(**inputs)[0], handle.records[0]["kept"]


@every_case
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_each_block_runs_on_the_kept_tokens_alone(name, config, batch):
    family = FAMILIES[name]
    settings = family.configs[config]
    model = family.build(**settings)
    inputs, source = family.inputs(model, batch), make_artifact(model, table(4))
    dense = model(**inputs)[0]
    output, kept = pruned(model, source, inputs)
    assert {layer: index.shape[1] for layer, index in kept.items()} == {
        layer: k for layer, k in enumerate(source.table.tokens(0.7, family.N)) if layer
    }
    assert batch == 1 or any(not torch.equal(*index) for index in kept.values())
    wanted = run_by_hand(family, family.build(**settings), kept, inputs)
    torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-4)
    assert (output - dense).abs().max() > 0.05
    assert torch.equal(model(**inputs)[0], dense)  # disabled again


@every_case
@pytest.mark.parametrize("options", [{}, {"share_selection": True}], ids=str)
@torch.no_grad()
def test_a_ratio_of_one_is_the_dense_model(name, config, options):
    family = FAMILIES[name]
    model = family.build(**family.configs[config])
    inputs = family.inputs(model)
    dense = model(**inputs)[0]
    with shiva_ext.enable(model, make_artifact(model), ratio=1.0, **options):
        assert torch.equal(model(**inputs)[0], dense)


@every_family
@torch.no_grad()
def test_all_tokens_kept_by_a_pruned_block_are_the_dense_model_within_rounding(name, monkeypatch):
    family = FAMILIES[name]
    model = family.build()
    inputs = family.inputs(model)
    dense = model(**inputs)[0]
    monkeypatch.setattr(hooks.SelectionState, "select", lambda self, layer, x, k: torch.arange(k).repeat(len(x), 1))
    monkeypatch.setattr(hooks.BlockHook, "new_forward", always_pruned)
    with shiva_ext.enable(model, make_artifact(model)):
        torch.testing.assert_close(model(**inputs)[0], dense, rtol=1e-4, atol=1e-4)


def always_pruned(self, module, *args, **kwargs):
    """A block hook that takes the pruned path although nothing is left out."""
    adapter, forward = self.state.adapter, self.fn_ref.original_forward
    x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    kept = self.state.select(self.layer, x, x.shape[1])
    return adapter.call(forward, x, args, kwargs, kept)


@every_family
@pytest.mark.parametrize("selector", [RandomSelector, LargestNormSelector])
@torch.no_grad()
def test_selectors_without_training_work_too(name, selector):
    family = FAMILIES[name]
    model = family.build()
    output, kept = pruned(model, selector(0.5), family.inputs(model, 3))
    assert output.isfinite().all() and len(kept) == 3
    assert all(index.shape == (3, family.N // 2) for index in kept.values())


@every_case
@torch.no_grad()
def test_samples_of_a_batch_do_not_touch_each_other(name, config):
    family = FAMILIES[name]
    model = family.build(**family.configs[config])
    inputs, source = family.inputs(model, 3), make_artifact(model)
    alone = {
        key: [value[1]] if isinstance(value, list) else value[1:2] if torch.is_tensor(value) else value
        for key, value in inputs.items()
    }
    with shiva_ext.enable(model, source):
        torch.testing.assert_close(model(**inputs)[0][1:2], model(**alone)[0], rtol=1e-4, atol=1e-4)


@every_family
@pytest.mark.parametrize("estimator", ["counterfactual", "residual"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_router_and_ratios(name, estimator, checkpointing):
    family = FAMILIES[name]
    model = family.build()
    source = make_artifact(model)
    source.router.requires_grad_(True)
    if checkpointing:
        model.enable_gradient_checkpointing()
    state = hooks.SelectionState(source, adapter_for(model))
    hooks.attach(model, state)
    inputs = {key: value for key, value in family.inputs(model).items() if key != "return_dict"}
    teacher = run_teacher(model, state, **inputs)
    ratios = torch.tensor([1.0, 0.6, 0.5, 0.7], requires_grad=True)
    output, student = run_student(model, state, get_estimator(estimator), ratios, teacher, **inputs)
    counts = {layer: int(family.N * ratio) for layer, ratio in ((1, 0.6), (2, 0.5), (3, 0.7))}
    assert {layer: kept.shape[1] for layer, kept in student.kept.items()} == counts
    (output - teacher.output).square().mean().backward()
    assert (ratios.grad[1:] != 0).all()
    assert all(p.grad is not None and p.grad.any() for p in source.router.parameters())


@every_family
@torch.no_grad()
def test_compiled_equals_eager_in_one_graph_a_set_of_counts(name):
    torch.compiler.reset()
    family = FAMILIES[name]
    model = family.build(num_layers=3)
    source = make_artifact(model, RatioTable([0.2, 0.8], torch.tensor([[1, 0.5, 0.75], [1, 0.25, 0.5]])))
    handle = shiva_ext.enable(model, source)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
    for _ in range(2):
        for sigma in (0.1, 0.9):
            handle.at(sigma)
            inputs = family.inputs(model, sigma=sigma)
            torch.testing.assert_close(compiled(**inputs)[0], model(**inputs)[0], rtol=1e-6, atol=1e-6)
    assert counter.frame_count == 2


@every_case
@torch.no_grad()
def test_operations_equal_pytorchs_counter(name, config):
    family = FAMILIES[name]
    settings = family.configs[config]
    model = family.build(**settings)
    inputs = family.inputs(model, 1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs)
    assert family.flops(model, family.text, family.N) == counter.get_total_flops()
    kept = {1: torch.arange(6)[None], 2: torch.arange(9)[None]}
    counts = {layer: index.shape[1] for layer, index in kept.items()}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run_by_hand(family, model, kept, inputs)
    assert family.flops(model, family.text, family.N, kept=counts) == counter.get_total_flops()
    with pytest.raises(ValueError, match="layer 9"):
        family.flops(model, family.text, kept={9: 1})


@every_family
def test_summary_counts_it_and_names_the_wrapped_blocks(name):
    family = FAMILIES[name]
    model = family.build()
    shiva_ext.enable(model, make_artifact(model), ratio=0.5)
    summary = shiva_ext.summary(model, num_tokens=family.N, steps=3, text_tokens=family.text)
    assert summary.mean_ratio == 0.5 and summary.flop_speedup > 1.1
    assert summary.dense_flops == family.flops(model, family.text, family.N)
    if name in ("dit", "qwenimage"):
        assert summary.wrapped == {} and "3 pruned blocks run fused" in str(summary)
    else:
        assert list(summary.wrapped) == [1, 2, 3] and "0 pruned blocks run fused; wrapped L1 L2 L3: " in str(summary)


@torch.no_grad()
def test_wan_with_a_timestep_for_each_token():
    family = FAMILIES["wan"]
    model, source = family.build(), None
    inputs, source = wan_inputs(model, each_token=True), make_artifact(model, table(4))
    output, kept = pruned(model, source, inputs)
    wanted = run_by_hand(family, family.build(), kept, inputs)
    torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-4)
    timestep = adapter_for(model).conditioning(model, inputs).timestep
    assert torch.equal(timestep, torch.full((2,), 700.0))


@torch.no_grad()
def test_sana_at_another_size_puts_its_tokens_in_their_places():
    family = FAMILIES["sana"]
    model, source = family.build(), make_artifact(family.build(), table(4))
    inputs = family.inputs(model) | {"hidden_states": torch.randn(2, 4, 3, 7)}
    output, kept = pruned(model, source, inputs)
    torch.testing.assert_close(output, run_by_hand(family, family.build(), kept, inputs), rtol=1e-4, atol=1e-4)


def test_a_mask_of_image_tokens_is_refused_by_sana():
    model = FAMILIES["sana"].build()
    with shiva_ext.enable(model, make_artifact(model)), pytest.raises(ValueError, match="attention_mask masks image"):
        model(**FAMILIES["sana"].inputs(model), attention_mask=torch.ones(2, 24))


def dit_pipeline(model):
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, layers_per_block=1).eval()
    pipe = DiTPipeline(model, vae, DDIMScheduler())
    return pipe, dict(class_labels=[1, 2], guidance_scale=4.0, output_type="pt", return_dict=False)


def sana_pipeline(model):
    torch.manual_seed(0)
    vae = AutoencoderDC(
        in_channels=3, latent_channels=4, encoder_block_types=("ResBlock",), decoder_block_types=("ResBlock",),
        encoder_block_out_channels=(8,), decoder_block_out_channels=(8,), encoder_layers_per_block=(1,),
        decoder_layers_per_block=[1], encoder_qkv_multiscales=((),), decoder_qkv_multiscales=((),),
        downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm",
        decoder_act_fns="silu", scaling_factor=1.0,
    )  # fmt: skip
    pipe = SanaPipeline(
        None,
        None,
        vae.eval(),
        model,
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    )
    generator = torch.Generator().manual_seed(1)
    prompts, masks = torch.randn(2, 2, TEXT, PROMPT, generator=generator), torch.ones(2, TEXT)
    return pipe, dict(
        prompt_embeds=prompts[0], negative_prompt_embeds=prompts[1], prompt_attention_mask=masks,
        negative_prompt_attention_mask=masks, prompt=None, negative_prompt=None, height=32, width=32,
        use_resolution_binning=False, output_type="latent", return_dict=False,
    )  # fmt: skip


def qwen_pipeline(model):
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipe = QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), vae.eval(), None, None, model)
    generator = torch.Generator().manual_seed(1)
    prompts, mask = torch.randn(2, 2, TEXT, PROMPT, generator=generator), torch.ones(2, TEXT, dtype=torch.long)
    side = 8 * pipe.vae_scale_factor
    return pipe, dict(
        prompt_embeds=prompts[0], prompt_embeds_mask=mask, negative_prompt_embeds=prompts[1],
        negative_prompt_embeds_mask=mask, true_cfg_scale=4.0, height=side, width=side, output_type="latent",
        return_dict=False,
    )  # fmt: skip


def wan_pipeline(model):
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    pipe = WanPipeline(None, None, vae.eval(), FlowMatchEulerDiscreteScheduler(), model)
    prompts = torch.randn(2, 2, TEXT, PROMPT, generator=torch.Generator().manual_seed(1))
    return pipe, dict(
        prompt_embeds=prompts[0], negative_prompt_embeds=prompts[1], height=32, width=32, num_frames=9,
        output_type="latent", return_dict=False,
    )  # fmt: skip


PIPELINES = {"dit": dit_pipeline, "sana": sana_pipeline, "qwenimage": qwen_pipeline, "wan": wan_pipeline}


@every_family
def test_the_pipeline_runs_and_is_left_as_it_was(name):
    family = FAMILIES[name]
    model = family.build()
    if name == "dit":  # the pipeline's empty class is number 1000
        model = family.build(num_embeds_ada_norm=1000)
    pipe, arguments = PIPELINES[name](model)
    pipe.set_progress_bar_config(disable=True)

    def generate():
        return pipe(num_inference_steps=3, generator=torch.Generator().manual_seed(0), **arguments)[0]

    dense = generate()
    handle = shiva_ext.enable(pipe, make_artifact(model, table(4)), batched_guidance=True if name == "dit" else None)
    handle.record()
    output = generate()
    assert output.shape == dense.shape and not torch.equal(output, dense) and output.isfinite().all()
    calls = 3 * (1 if handle.state.adapter.guides_in_batch else 2)
    assert len(handle.records) == calls
    for record in handle.records:
        for kept in record["kept"].values():
            assert len(kept) == (4 if calls == 3 else 2)
            assert calls == 6 or torch.equal(kept[:2], kept[2:])
    shiva_ext.disable(pipe)
    assert torch.equal(generate(), dense)


def test_a_pipeline_that_does_not_tell_whether_it_guides_gets_a_warning():
    model = FAMILIES["dit"].build()
    pipe, _ = dit_pipeline(model)
    with pytest.warns(UserWarning, match="DiTPipeline does not tell whether it guides"):
        shiva_ext.enable(pipe, make_artifact(model)).disable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shiva_ext.enable(pipe, make_artifact(model), batched_guidance=False).disable()


@torch.no_grad()
def test_qwen_image_with_one_shape_for_a_batch_and_one_timestep_for_all():
    family = FAMILIES["qwenimage"]
    model = family.build(zero_cond_t=True)
    inputs, source = family.inputs(model, 3), make_artifact(model, table(4))
    wanted, kept = pruned(model, source, inputs)
    single = inputs | {"img_shapes": inputs["img_shapes"][:1], "timestep": inputs["timestep"][:1]}
    got, also = pruned(model, source, single)
    assert all(torch.equal(kept[layer], also[layer]) for layer in kept)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_the_mean_of_a_long_prompt_stays_finite_in_float16():
    prompt, mask = torch.full((1, 300, 4), 300.0, dtype=torch.float16), torch.ones(1, 300)
    assert torch.equal(mean_token(prompt, mask), torch.full((1, 4), 300.0, dtype=torch.float16))
    assert torch.equal(mean_token(prompt, 0 * mask), torch.zeros(1, 4, dtype=torch.float16))


def test_a_sampler_whose_timesteps_are_angles_is_refused_and_nothing_is_left():
    model = FAMILIES["sana"].build()
    pipe, _ = sana_pipeline(model)
    pipe.scheduler = SCMScheduler()
    with pytest.raises(ValueError, match="SCMScheduler's timesteps are angles"):
        shiva_ext.enable(pipe, make_artifact(model))
    assert not hasattr(model, "_diffusers_hook")


def test_a_pipeline_with_two_transformers_says_so_and_prunes_both_if_asked():
    model, second = FAMILIES["wan"].build(), FAMILIES["wan"].build()
    pipe, arguments = wan_pipeline(model)
    pipe.register_modules(transformer_2=second)
    pipe.register_to_config(boundary_ratio=0.7)
    pipe.set_progress_bar_config(disable=True)

    def generate():
        return pipe(num_inference_steps=4, generator=torch.Generator().manual_seed(0), **arguments)[0]

    dense = generate()
    with pytest.warns(UserWarning, match="second transformer.*component='transformer_2'"):
        shiva_ext.enable(pipe, make_artifact(model, table(4)))
    first = shiva_ext.get_handle(model).record()
    one = generate()
    assert 0 < len(first.records) < 8 and not hasattr(second, "_shiva_ext_handle")
    handle = shiva_ext.enable(pipe, make_artifact(second, table(4)), component="transformer_2").record()
    first.record()
    both = generate()
    assert len(first.records) + len(handle.records) == 8  # four steps, two calls each
    low, high = (sorted({round(r["timestep"]) for r in h.records}) for h in (handle, first))
    assert max(low) < 700 <= min(high)
    assert not torch.equal(one, dense) and not torch.equal(both, one)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shiva_ext.enable(pipe, make_artifact(model, table(4)))
    shiva_ext.disable(pipe)
    assert torch.equal(generate(), dense) and not hasattr(second, "_shiva_ext_handle")
    with pytest.raises(ValueError, match="has no component 'transformer_3'"):
        shiva_ext.enable(pipe, make_artifact(model), component="transformer_3")


def test_perturbed_attention_guidance_has_no_halves_to_agree():
    model = FAMILIES["sana"].build()
    pipe, _ = sana_pipeline(model)
    guiding = {"do_classifier_free_guidance": True, "do_perturbed_attention_guidance": True}
    pipe.__class__ = type("PAG", (type(pipe),), {name: property(lambda self: True) for name in guiding})
    handle = shiva_ext.enable(pipe, make_artifact(model))
    pipe.scheduler.set_timesteps(2)
    assert handle.state.sigma is not None and handle.state.batched_guidance is False


@every_family
@torch.no_grad()
def test_weights_are_brought_before_the_conditioning_reads_them(name, monkeypatch):
    family = FAMILIES[name]
    model = family.build()
    events, onload, read = [], ModuleGroup.onload_, type(adapter_for(model)).conditioning
    apply_group_offloading(
        model, torch.device("cpu"), torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )
    monkeypatch.setattr(ModuleGroup, "onload_", lambda self: (events.append("weights"), onload(self))[1])
    monkeypatch.setattr(
        type(adapter_for(model)), "conditioning", lambda *args: (events.append("conditioning"), read(*args))[1]
    )
    with shiva_ext.enable(model, make_artifact(model)):
        model(**family.inputs(model))
    assert events.index("weights") < events.index("conditioning")
