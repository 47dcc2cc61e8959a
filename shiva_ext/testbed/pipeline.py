"""A testbed as a diffusers pipeline from a prompt to a picture: what takes a pipeline can be tried on it."""

from types import SimpleNamespace

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from torch import Tensor

from .beds import Testbed, get_testbed

_TEXT_PARTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")


class _Pixels:
    """Stands for the autoencoder: the models work on pixels. Grey pictures get three equal channels."""

    config = SimpleNamespace(scaling_factor=1.0, shift_factor=0.0, block_out_channels=(1,), latent_channels=3)

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (latents.expand(-1, 3, -1, -1),)


class TestbedPipeline(StableDiffusion3Pipeline):
    """diffusers' own pipeline around a testbed's model, with its prompts; :func:`testbed_pipeline` makes one."""

    __test__ = False  # no test of pytest's

    @classmethod
    def of(cls, bed: Testbed, dtype: torch.dtype = torch.float32) -> "TestbedPipeline":
        """The pipeline of a testbed, its weights in a dtype. (The base class wants __init__ as it has it.)"""
        transformer, prompts = bed.load(dtype)
        parts = dict.fromkeys(_TEXT_PARTS)
        pipe = cls(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=_Pixels(), **parts)
        pipe._bed, pipe._prompts = bed, prompts
        return pipe

    def encode_prompt(self, prompt, *_, num_images_per_prompt: int = 1, **ignored) -> tuple[Tensor, ...]:
        """Embeddings of the testbed's prompts, and of the empty one, as the base class returns them.

        Raises:
            ValueError: a prompt that the testbed does not know, or one of no text.
        """
        texts = [prompt] if isinstance(prompt, str) else list(prompt or [])
        names = self._bed.prompts()
        unknown = [text for text in texts if text not in names]
        if unknown or not texts:
            raise ValueError(
                f"TestbedPipeline: unknown prompt {unknown[0] if unknown else prompt!r}, wanted one of "
                f"{', '.join(names[:5])} ... (all {len(names)}: get_testbed({self._bed.name!r}).prompts())"
            )
        labels = torch.tensor([names.index(text) for text in texts]).repeat_interleave(num_images_per_prompt)
        null = torch.full_like(labels, self._bed.null_prompt)
        device, dtype = self.transformer.device, self.transformer.dtype
        (tokens, pooled), (no_tokens, no_pooled) = (
            [part.to(device, dtype) for part in self._prompts(each)] for each in (labels, null)
        )
        return tokens, no_tokens, pooled, no_pooled


def testbed_pipeline(name: str, dtype: torch.dtype = torch.float32) -> TestbedPipeline:
    """The pipeline of a testbed: ``testbed_pipeline("fashion")("sneaker", num_inference_steps=20, guidance_scale=2)``.

    Raises:
        ValueError: there is no such testbed.
    """
    return TestbedPipeline.of(get_testbed(name), dtype)


testbed_pipeline.__test__ = False
