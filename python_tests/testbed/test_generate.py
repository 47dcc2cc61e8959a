"""The testbed's own sampling loop does what StableDiffusion3Pipeline does."""

import pytest
import torch

from shiva_ext.testbed.model import NULL_PROMPT, PromptTable, build_pipeline, build_transformer
from shiva_ext.testbed.sampling import balanced_labels, generate, make_noise, schedule


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    transformer = build_transformer(num_layers=2).eval()
    for name, parameter in transformer.named_parameters():
        # As initialised, the modulation is so weak that guidance and timestep would hardly show.
        if "linear" in name or "embedder" in name:
            parameter.data.mul_(4)
    return transformer, PromptTable().eval()


@pytest.mark.parametrize("steps", [2, 7, 20, 28])
def test_schedule_falls_evenly_from_one_to_a_thousandth_and_then_to_zero(steps):
    expected = [1 - (1 - 0.001) * step / (steps - 1) for step in range(steps)] + [0]
    torch.testing.assert_close(schedule(steps), torch.tensor(expected))


@pytest.mark.parametrize("guidance", [1.0, 2.0, 4.5])
def test_images_equal_diffusers_pipeline(model, guidance):
    transformer, prompts = model
    labels, noise = torch.tensor([3, 9, 0]), make_noise(3, seed=5)
    tokens, pooled = prompts(labels)
    empty_tokens, empty_pooled = prompts(torch.full_like(labels, NULL_PROMPT))
    pipeline = build_pipeline(transformer)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt_embeds=tokens, pooled_prompt_embeds=pooled, negative_prompt_embeds=empty_tokens,
        negative_pooled_prompt_embeds=empty_pooled, latents=noise, num_inference_steps=6, guidance_scale=guidance,
        output_type="latent",
    ).images  # fmt: skip
    images = generate(transformer, prompts, labels, noise, steps=6, guidance=guidance, batch_size=3)
    torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-5)
    assert (images - noise).abs().max() > 0.1
    assert guidance == 1 or not torch.allclose(images, generate(transformer, prompts, labels, noise, 6, 1.0), atol=1e-3)


def test_batch_size_does_not_change_the_images(model):
    labels, noise = balanced_labels(5), make_noise(5, seed=0)
    whole = generate(*model, labels, noise, steps=3, batch_size=5)
    torch.testing.assert_close(generate(*model, labels, noise, steps=3, batch_size=2), whole, rtol=1e-5, atol=1e-5)


def test_bfloat16_weights_keep_a_float32_state_and_stay_close(model):
    transformer, prompts = model
    labels, noise = balanced_labels(2), make_noise(2, seed=0)
    half = build_transformer(num_layers=2).eval()
    half.load_state_dict(transformer.state_dict())
    images = generate(half.bfloat16(), prompts, labels, noise, steps=3)
    assert images.dtype == torch.float32
    assert not torch.equal(images, images.bfloat16().float())
    expected = generate(transformer, prompts, labels, noise, steps=3)
    assert (images - expected).std() < 0.1 * expected.std()


def test_on_step_sees_every_step_of_every_batch_and_the_final_state(model):
    seen = []
    images = generate(
        *model, balanced_labels(3), make_noise(3, seed=0), steps=2, batch_size=2,
        on_step=lambda step, sigma, state: seen.append((step, sigma, state)),
    )  # fmt: skip
    assert [(step, round(sigma, 3), len(state)) for step, sigma, state in seen] == [
        (0, 1.0, 2), (1, 0.001, 2), (0, 1.0, 1), (1, 0.001, 1)
    ]  # fmt: skip
    assert torch.equal(seen[-1][2], images[2:])


def test_noise_depends_on_its_seed_alone_and_shorter_noise_is_a_prefix():
    assert torch.equal(make_noise(4, seed=1)[:2], make_noise(2, seed=1))
    assert not torch.equal(make_noise(2, seed=1), make_noise(2, seed=2))
    assert make_noise(0, seed=1).shape == (0, 1, 32, 32)


def test_labels_are_balanced():
    assert balanced_labels(200).bincount(minlength=10).tolist() == [20] * 10


def test_no_images_are_no_error(model):
    assert generate(*model, balanced_labels(0), torch.empty(0, 1, 32, 32), steps=2).shape == (0, 1, 32, 32)


def test_labels_that_do_not_match_the_noise_are_refused(model):
    with pytest.raises(
        ValueError, match=r"labels must be \[B\] and noise \[B, C, H, W\], got \[2\] and \[3, 1, 32, 32\]"
    ):
        generate(*model, balanced_labels(2), make_noise(3, seed=0))


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        schedule(0)


class Decay(torch.nn.Module):
    """A velocity that is the state itself: images fall by a factor e on their way."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images, tokens, pooled, timestep, return_dict):
        return (images,)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("adams", 2)])
def test_a_solver_converges_by_its_order(model, solver, order):
    labels, noise = balanced_labels(1), torch.ones(1, 1, 4, 4)
    errors = []
    for steps in (16, 32, 64):
        images = generate(Decay(), model[1], labels, noise, steps=steps, guidance=1.0, solver=solver)
        errors.append((images.mean() - torch.tensor(-1.0).exp()).abs().item())
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert coarse / fine == pytest.approx(2**order, rel=0.2)


def test_an_unknown_solver_is_refused(model):
    with pytest.raises(ValueError, match="solver is 'heun', wanted one of 'euler', 'adams'"):
        generate(*model, balanced_labels(1), make_noise(1, seed=0), steps=2, solver="heun")
