"""The pipeline: exact on oracles, one estimate of the velocity, inversion, inpainting, folders, and what it refuses."""

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from shiva_ext.caf import CAFPipeline, widen_input

from .networks import CHANNELS, FAMILIES, SIDE, draw, filled, make_oracles, make_pipeline, make_sd3, prompts

SHAPE = (2, CHANNELS, SIDE, SIDE)
X0, X1 = draw(*SHAPE, seed=1), draw(*SHAPE, seed=2)


def latents(pipe, batch=2, **options):
    return pipe(**prompts(batch), output_type="latent", **options).images


@pytest.mark.parametrize("h", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("N", [1, 2, 5])
def test_oracles_give_the_data_and_by_inversion_the_noise(N, h):
    pipe = make_oracles(X0.double(), X1.double(), h)
    found = latents(pipe, latents=X0.double(), num_inference_steps=N)
    torch.testing.assert_close(found, X1.double(), rtol=0, atol=1e-6)
    back = pipe.invert(X1.double(), **prompts(2), num_inference_steps=N)
    torch.testing.assert_close(back.latents, X0.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("N", [1, 3])
def test_the_velocity_is_estimated_once_and_the_acceleration_at_even_times(N):
    pipe = make_oracles(X0, X1, 1.5)
    latents(pipe, latents=X0, num_inference_steps=N)
    assert pipe.velocity.shares == [[0.0, 0.0]]
    shares = [pytest.approx(t**2 + 1.5 * (t - t**2), abs=1e-5) for t in (i / N for i in range(N + 1))]
    assert pipe.acceleration.shares == [[share] * 2 for share in shares[:-1]]
    pipe.velocity.shares, pipe.acceleration.shares = [], []
    pipe.invert(X1, **prompts(2), num_inference_steps=N)
    assert pipe.velocity.shares == [[1.0, 1.0]]
    assert pipe.acceleration.shares == [[share] * 2 for share in reversed(shares[1:])]


def test_a_given_velocity_is_taken_as_it_is():
    pipe = make_oracles(X0, X1, 1.5)
    latents(pipe, latents=X0, initial_velocity=X1 - X0)
    assert pipe.velocity.shares == []


@torch.no_grad()
def test_the_steps_are_those_of_algorithm_2():
    pipe, given = make_pipeline(), prompts(2)
    tokens, pooled = given.values()

    def call(network, x, t):
        sigma = 1 - t**2 - 1.5 * (t - t**2)
        return network(x, tokens, pooled, torch.full((2,), 1000 * sigma), return_dict=False)[0]

    v0 = call(pipe.velocity, X0, 0.0)
    x = X0
    for i in range(3):
        a = call(pipe.acceleration, torch.cat([x, v0], dim=1), i / 3) - 2 * v0
        x = x + v0 / 3 + (2 * i + 1) / 6 * a / 3
    torch.testing.assert_close(latents(pipe, latents=X0, num_inference_steps=3), x, rtol=1e-4, atol=1e-4)


def test_the_acceleration_makes_good_what_the_velocity_has_wrong():
    pipe = make_oracles(X0, X1, 1.5)
    pipe.velocity.answer = draw(*SHAPE, seed=7)
    for N in (1, 4):
        found = pipe.invert(X1, **prompts(2), num_inference_steps=N)
        torch.testing.assert_close(found.latents, X0, rtol=0, atol=1e-5)
        again = latents(pipe, latents=found.latents, initial_velocity=found.initial_velocity, num_inference_steps=N)
        torch.testing.assert_close(again, X1, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_generates(family):
    pipe = make_pipeline(FAMILIES[family]())
    given = dict(class_labels=torch.tensor([1, 4])) if family == "dit" else prompts(2)
    if family == "pixart":
        del given["pooled_prompt_embeds"]
        given["prompt_attention_mask"] = torch.ones(2, 3)
    images = pipe(**given, num_inference_steps=2, output_type="latent").images
    assert images.shape == SHAPE and torch.isfinite(images).all()


def test_a_generator_fixes_the_noise():
    pipe = make_pipeline()
    first, second = (latents(pipe, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second) and first.shape == SHAPE
    assert not torch.equal(first, latents(pipe, generator=torch.Generator().manual_seed(4)))


def test_a_batch_gives_what_its_samples_give_alone():
    pipe, given = make_pipeline(), prompts(2)
    whole = latents(pipe, latents=X0, num_inference_steps=2)
    alone = {name: value[1:] for name, value in given.items()}
    found = pipe(**alone, latents=X0[1:], num_inference_steps=2, output_type="latent").images
    torch.testing.assert_close(found, whole[1:], rtol=1e-4, atol=1e-4)


def test_no_conditions_give_no_pictures():
    assert latents(make_pipeline(), batch=0).shape == (0, CHANNELS, SIDE, SIDE)


def test_output_types_are_those_of_diffusers():
    pipe = make_pipeline(make_grey())
    images = {kind: pipe(**prompts(2), latents=X0[:, :1], output_type=kind).images for kind in ("pil", "np", "pt")}
    assert isinstance(images["pil"][0], Image.Image) and images["pil"][0].size == (SIDE, SIDE)
    assert images["np"].shape == (2, SIDE, SIDE, 1) and images["pt"].shape == (2, 1, SIDE, SIDE)
    assert 0 <= images["pt"].min() and images["pt"].max() <= 1
    assert torch.is_tensor(pipe(**prompts(2), output_type="pt", return_dict=False)[0])
    with pytest.raises(ValueError, match="output_type is 'jpg'"):
        pipe(**prompts(2), output_type="jpg")


def make_grey():
    torch.manual_seed(0)
    model = make_sd3()
    return filled(type(model)(**{**dict(model.config), "in_channels": 1, "out_channels": 1}))


def test_latents_are_decoded_and_images_encoded_by_the_vae():
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8,), latent_channels=CHANNELS, norm_num_groups=4, layers_per_block=1, scaling_factor=1.5,
        shift_factor=0.1,
    ).eval()  # fmt: skip
    pipe = make_pipeline(vae=vae)
    images = pipe(**prompts(2), latents=X0, output_type="pt").images
    with torch.no_grad():
        decoded = vae.decode(latents(pipe, latents=X0) / 1.5 + 0.1).sample
    torch.testing.assert_close(images, (decoded / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)
    assert pipe.encode(draw(2, 3, SIDE, SIDE).clamp(-1, 1)).shape == SHAPE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pipeline_is_loaded_as_it_was_saved(tmp_path, dtype):
    pipe = make_pipeline()
    pipe.scheduler.register_to_config(clip_sample=True)
    pipe.to(dtype).save_pretrained(tmp_path)
    again = CAFPipeline.from_pretrained(tmp_path, torch_dtype=dtype)
    again.set_progress_bar_config(disable=True)
    assert again.vae is None and again.scheduler.config.clip_sample is True
    assert again.acceleration.config.in_channels == 2 * CHANNELS
    assert torch.equal(latents(again, latents=X0), latents(pipe, latents=X0))


def test_inpainting_leaves_what_is_known_and_does_not_look_into_the_hole():
    pipe = make_pipeline()
    found = [
        pipe.inpaint(
            image, (2, 3, 4, 2), **prompts(2), num_inference_steps=3, generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images
        for image in (X1, with_hole(X1, 50.0))
    ]  # fmt: skip
    hole = torch.zeros(SHAPE, dtype=torch.bool)
    hole[:, :, 2:6, 3:5] = True
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0][~hole], X1[~hole])
    assert (found[0] - X1)[hole].abs().min() > 0
    mask = hole[:1, :1].float()
    same = pipe.inpaint(
        X1, mask, **prompts(2), num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="latent"
    ).images
    assert torch.equal(same, found[0])


def with_hole(image, value):
    image = image.clone()
    image[:, :, 2:6, 3:5] = value
    return image


def test_inpainting_on_oracles_fills_the_hole_as_the_path_from_the_noise_does():
    """One step: the hole holds the noise, and what it becomes is noise + v0 + a / 2."""
    pipe = make_oracles(X0, X1, 1.5)
    images = pipe.inpaint(
        X1, (0, 0, SIDE, SIDE), **prompts(2), num_inference_steps=1, generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images  # fmt: skip
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(images, noise + (X1 - X0), rtol=0, atol=1e-5)
    assert pipe.velocity.shares == [[1.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    "mask, message",
    [
        ((0, 0, SIDE + 1, 2), "inside 8 x 8 pixels"),
        ((0, -1, 2, 2), "inside 8 x 8 pixels"),
        ((0, 0, 0, 2), "inside 8 x 8 pixels"),
        (torch.zeros(3, 1, SIDE, SIDE), r"the mask is \[3, 1, 8, 8\]"),
        (torch.full((1, 1, SIDE, SIDE), 0.5), "values other than 0 and 1"),
    ],
)
def test_a_hole_that_is_none_is_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline().inpaint(X1, mask, **prompts(2))


def test_what_does_not_fit_is_refused():
    pipe = make_pipeline()
    with pytest.raises(ValueError, match="wants prompt_embeds and pooled_prompt_embeds, .* got none of them"):
        pipe()
    with pytest.raises(ValueError, match="got prompt_embeds of 2$"):
        pipe(prompt_embeds=prompts(2)["prompt_embeds"])
    with pytest.raises(ValueError, match="prompt_embeds of 2, pooled_prompt_embeds of 1"):
        pipe(prompt_embeds=prompts(2)["prompt_embeds"], pooled_prompt_embeds=prompts(1)["pooled_prompt_embeds"])
    with pytest.raises(ValueError, match="class_labels of 2"):
        pipe(**prompts(2), class_labels=torch.zeros(2))
    for wrong in (X0[:1], X0[:, :1], X0[0], X0[..., :7]):
        with pytest.raises(ValueError, match=r"latents must be \[2, 2, H, W\] .* multiples of 2"):
            pipe(**prompts(2), latents=wrong)
    with pytest.raises(ValueError, match="num_inference_steps is 0"):
        pipe(**prompts(2), num_inference_steps=0)
    with pytest.raises(ValueError, match=r"shape of x, \[2, 2, 8, 8\], got \[1, 2, 8, 8\]"):
        pipe(**prompts(2), latents=X0, initial_velocity=X0[:1])


def test_networks_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="the acceleration network takes 2 channels, wanted 4"):
        make_pipeline(make_sd3(), make_sd3())
    with pytest.raises(ValueError, match="takes 8 channels, wanted 4"):
        make_pipeline(make_sd3(), widen_input(widen_input(make_sd3())))


def test_other_sizes_than_the_networks_work():
    pipe = make_pipeline()
    small = draw(2, CHANNELS, 4, 6)
    assert latents(pipe, latents=small).shape == small.shape
