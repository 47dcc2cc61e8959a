"""Diffusers' own StableDiffusion3Pipeline and StableDiffusion3Img2ImgPipeline with token selection on."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from peft import LoraConfig

import shiva_ext
from shiva_ext.selection import RandomSelector
from shiva_ext.testbed.model import build_pipeline

from .tiny import (
    CHANNELS,
    SIZE,
    N,
    make_artifact,
    make_img2img,
    make_model,
    make_pipeline,
    pipeline_inputs,
    run_by_hand,
    varying_table,
)


def counts(handle) -> list[list[int]]:
    """Kept tokens of the pruned layers in each recorded call."""
    return [[index.shape[1] for index in record["kept"].values()] for record in handle.records]


def announced(table, timesteps, num_tokens=N) -> list[list[int]]:
    """What the table announces for these timesteps, layers with all tokens left out."""
    return [[k for k in table.tokens(t / 1000, num_tokens)[1:] if k < num_tokens] for t in timesteps.tolist()]


def sample_by_hand(handle, model, inputs, sigmas) -> torch.Tensor:
    """Guided Euler sampling with the kept tokens that were recorded, written out."""
    generator = torch.Generator().manual_seed(inputs["generator"].initial_seed())
    latents = torch.randn(len(inputs["prompt_embeds"]), CHANNELS, SIZE, SIZE, generator=generator)
    text = torch.cat([inputs["negative_prompt_embeds"], inputs["prompt_embeds"]])
    pooled = torch.cat([inputs["negative_pooled_prompt_embeds"], inputs["pooled_prompt_embeds"]])
    for record, sigma, after in zip(handle.records, sigmas[:-1], sigmas[1:], strict=True):
        call = dict(
            hidden_states=torch.cat([latents] * 2),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=(1000 * sigma).expand(len(text)),
        )
        unprompted, prompted = run_by_hand(model, record["kept"], call)[0].chunk(2)
        velocity = unprompted + inputs["guidance_scale"] * (prompted - unprompted)
        latents = latents + (after - sigma) * velocity
    return latents


@pytest.mark.parametrize("prompts", [1, 3])
def test_the_pipeline_samples_as_by_hand(prompts, pipe):
    handle = shiva_ext.enable(pipe, make_artifact(varying_table())).record()
    inputs = pipeline_inputs(prompts, steps=4)
    output = pipe(**inputs)[0]
    wanted = sample_by_hand(handle, make_model(), inputs, pipe.scheduler.sigmas)
    torch.testing.assert_close(output, wanted, rtol=1e-3, atol=1e-3)
    assert counts(handle) == announced(varying_table(), pipe.scheduler.timesteps)


def test_disable_gives_the_dense_pipelines_bits_back(pipe, artifact):
    dense = pipe(**pipeline_inputs())[0]
    handle = shiva_ext.enable(pipe, artifact)
    assert not torch.equal(pipe(**pipeline_inputs())[0], dense)
    handle.disable()
    assert torch.equal(pipe(**pipeline_inputs())[0], dense)


def test_ratio_1_gives_the_dense_pipelines_bits(pipe, artifact):
    dense = pipe(**pipeline_inputs(2))[0]
    shiva_ext.enable(pipe, artifact, ratio=1.0)
    assert torch.equal(pipe(**pipeline_inputs(2))[0], dense)


def test_guided_halves_keep_the_same_tokens(pipe, artifact):
    handle = shiva_ext.enable(pipe, artifact).record()
    pipe(**pipeline_inputs(prompts=2))
    for record in handle.records:
        for index in record["kept"].values():
            assert index.shape[0] == 4 and torch.equal(index[:2], index[2:])
            assert not torch.equal(index[0], index[1])


def test_without_guidance_each_prompt_keeps_its_own_tokens(pipe, artifact):
    handle = shiva_ext.enable(pipe, artifact).record()
    pipe(**pipeline_inputs(prompts=2, guidance=1.0))
    for record in handle.records:
        for index in record["kept"].values():
            assert index.shape[0] == 2 and not torch.equal(index[0], index[1])


def test_guidance_may_be_turned_on_and_off_between_runs(pipe, artifact):
    handle = shiva_ext.enable(pipe, artifact)
    for guidance, batch in ((1.0, 1), (4.0, 2), (1.0, 1), (4.0, 2)):
        handle.record()
        pipe(**pipeline_inputs(guidance=guidance))
        assert {len(index) for record in handle.records for index in record["kept"].values()} == {batch}


def test_guidance_may_be_turned_off_in_the_middle_of_a_run(pipe, artifact):
    def stop_guiding(pipeline, step, timestep, tensors):
        if step == 0:
            pipeline._guidance_scale = 0.0
            return {name: tensor.chunk(2)[1] for name, tensor in tensors.items()}
        return tensors

    handle = shiva_ext.enable(pipe, artifact).record()
    pipe(
        **pipeline_inputs(prompts=2),
        callback_on_step_end=stop_guiding,
        callback_on_step_end_tensor_inputs=["prompt_embeds", "pooled_prompt_embeds"],
    )
    first, second, third = (record["kept"][1] for record in handle.records)
    assert torch.equal(first[:2], first[2:])
    assert len(second) == len(third) == 2 and not torch.equal(second[0], second[1])


def test_several_images_per_prompt_are_several_samples(pipe, artifact):
    """The pipeline repeats only what it has encoded itself, so that this run is given a text encoder's answer."""
    inputs = pipeline_inputs(prompts=2)
    embeddings = [inputs.pop(name) for name in list(inputs) if name.endswith("embeds")]
    tokens, pooled, negative_tokens, negative_pooled = embeddings

    def encode_prompt(prompt, num_images_per_prompt, **options):
        rows = [("shoe", "shirt").index(word) for word in prompt for _ in range(num_images_per_prompt)]
        return tokens[rows], negative_tokens[rows], pooled[rows], negative_pooled[rows]

    pipe.encode_prompt = encode_prompt
    handle = shiva_ext.enable(pipe, artifact).record()
    noise = torch.randn(6, CHANNELS, SIZE, SIZE)
    together = pipe(["shoe", "shirt"], latents=noise, num_images_per_prompt=3, **inputs)[0]
    kept = handle.records[0]["kept"][1]
    assert kept.shape[0] == 12 and torch.equal(kept[:6], kept[6:])
    for row, word in enumerate(["shoe"] * 3 + ["shirt"] * 3):
        alone = pipe([word], latents=noise[row : row + 1], **inputs)[0]
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-3, atol=1e-3)


def test_the_resolution_may_change_from_run_to_run(pipe):
    table = varying_table()
    handle = shiva_ext.enable(pipe, make_artifact(table))
    for size in (8, 12, 4, 8):
        handle.record()
        assert pipe(**pipeline_inputs(size=size))[0].shape == (1, CHANNELS, size, size)
        assert counts(handle) == announced(table, pipe.scheduler.timesteps, (size // 2) ** 2)
    landscape = pipeline_inputs() | {"height": 4 * 8, "width": 12 * 8}
    handle.record()
    assert pipe(**landscape)[0].shape == (1, CHANNELS, 4, 12)
    assert counts(handle) == announced(table, pipe.scheduler.timesteps, 12)


@pytest.mark.parametrize("strength", [1.0, 0.6, 0.3])
@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_image_to_image_follows_its_own_steps(strength, guidance):
    pipe, table = make_img2img(make_model()), varying_table()
    inputs = pipeline_inputs(steps=10, guidance=guidance) | {"height": SIZE, "width": SIZE}
    image = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    dense = pipe(**inputs, image=image, strength=strength)[0]
    handle = shiva_ext.enable(pipe, make_artifact(table)).record()
    inputs["generator"].manual_seed(3)
    output = pipe(**inputs, image=image, strength=strength)[0]
    assert output.shape == dense.shape and not torch.equal(output, dense)
    steps = pipe.scheduler.timesteps[-round(10 * strength) :]
    assert [record["timestep"] for record in handle.records] == pytest.approx(steps.tolist())
    assert counts(handle) == announced(table, steps)
    handle.disable()
    inputs["generator"].manual_seed(3)
    assert torch.equal(pipe(**inputs, image=image, strength=strength)[0], dense)


def test_skip_layer_guidance_adds_unpaired_calls(pipe, artifact):
    options = dict(skip_guidance_layers=[1], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=0.9)
    dense = pipe(**pipeline_inputs(steps=4), **options)[0]
    handle = shiva_ext.enable(pipe, artifact).record()
    assert not torch.equal(pipe(**pipeline_inputs(steps=4), **options)[0], dense)
    calls = [(len(record["kept"][2]), list(record["kept"])) for record in handle.records]
    pair, skipping = (2, [1, 2, 3]), (1, [2, 3])
    assert calls == [pair, pair, skipping, pair, skipping, pair, skipping]
    shiva_ext.enable(pipe, artifact, ratio=1.0)
    assert torch.equal(pipe(**pipeline_inputs(steps=4), **options)[0], dense)


def test_a_lora_and_its_scale_work_in_the_pipeline(pipe):
    selector = RandomSelector(0.5)  # it keeps the same tokens whatever the weights are
    with shiva_ext.enable(pipe, selector):
        plain = pipe(**pipeline_inputs())[0]
    torch.manual_seed(0)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
    for scale in (0.0, 1.0):
        options = dict(joint_attention_kwargs={"scale": scale})
        dense = pipe(**pipeline_inputs(), **options)[0]
        with shiva_ext.enable(pipe, selector):
            output = pipe(**pipeline_inputs(), **options)[0]
        assert torch.allclose(output, plain, atol=1e-4) == (scale == 0)
        assert torch.equal(pipe(**pipeline_inputs(), **options)[0], dense)


def test_a_replaced_transformer_is_not_enabled(pipe, artifact):
    old = shiva_ext.enable(pipe, artifact)
    pipe.transformer = make_model(seed=9)
    dense = pipe(**pipeline_inputs())[0]
    assert torch.equal(dense, make_pipeline(make_model(seed=9))(**pipeline_inputs())[0])
    with pytest.raises(RuntimeError, match="not enabled on this model"):
        shiva_ext.summary(pipe)
    shiva_ext.enable(pipe, artifact).record()
    assert not torch.equal(pipe(**pipeline_inputs())[0], dense)
    assert len(shiva_ext.get_handle(pipe).records) == 3
    old.disable()
    shiva_ext.disable(pipe)
    assert torch.equal(pipe(**pipeline_inputs())[0], dense)
    assert "step" not in vars(pipe.scheduler)


def test_pipelines_that_share_a_transformer_take_turns(artifact):
    text = make_pipeline(make_model())
    image = make_img2img(text.transformer, text.scheduler)
    inputs = pipeline_inputs() | {"height": SIZE, "width": SIZE, "image": torch.rand(1, 3, SIZE, SIZE)}
    first = shiva_ext.enable(text, artifact)
    wanted = text(**pipeline_inputs())[0]
    second = shiva_ext.enable(image, artifact).record()
    image(**inputs)
    assert all(torch.equal(index[0], index[1]) for record in second.records for index in record["kept"].values())
    shiva_ext.enable(text, artifact)
    assert torch.equal(text(**pipeline_inputs())[0], wanted)
    first.disable(), second.disable()  # both replaced
    assert torch.equal(text(**pipeline_inputs())[0], wanted)
    shiva_ext.disable(image)
    assert torch.equal(text(**pipeline_inputs())[0], make_pipeline(make_model())(**pipeline_inputs())[0])


def test_half_precision_pipelines_run(artifact):
    for dtype in (torch.bfloat16, torch.float16):
        pipe = make_pipeline(make_model().to(dtype))
        inputs = {k: v.to(dtype) if torch.is_tensor(v) else v for k, v in pipeline_inputs(2).items()}
        handle = shiva_ext.enable(pipe, artifact).record()
        output = pipe(**inputs)[0]
        assert output.dtype == dtype and output.isfinite().all()
        assert counts(handle) == [[9, 9, 9]] * 3


def test_the_testbeds_pipeline_builder_is_the_same_pipeline(model, artifact):
    pipe = build_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is StableDiffusion3Pipeline and type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    shiva_ext.enable(pipe, artifact)
    wanted = make_pipeline(model)
    output = pipe(**pipeline_inputs())[0]
    shiva_ext.enable(wanted, artifact)
    assert torch.equal(wanted(**pipeline_inputs())[0], output)
