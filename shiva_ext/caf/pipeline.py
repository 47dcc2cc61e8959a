"""CAF's two networks and its scheduler as a diffusers pipeline: generation, inversion, inpainting."""

import inspect
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from ..training.recipes import recipe_for
from .model import family, predict
from .scheduler import CAFScheduler

# What a pipeline calls a condition, and what the transformers call it.
_ARGUMENTS = {
    "prompt_embeds": "encoder_hidden_states",
    "pooled_prompt_embeds": "pooled_projections",
    "prompt_attention_mask": "encoder_attention_mask",
    "class_labels": "class_labels",
}
_NEEDED = {
    "DiTTransformer2DModel": ("class_labels",),
    "PixArtTransformer2DModel": ("prompt_embeds",),
    "SD3Transformer2DModel": ("prompt_embeds", "pooled_prompt_embeds"),
}


class CAFInversion(NamedTuple):
    """What :meth:`CAFPipeline.invert` gives.

    Attributes:
        latents: the noise x0 [B, C, H, W].
        initial_velocity: v0 [B, C, H, W], as estimated from the data; give it to the pipeline again to get these back.
    """

    latents: Tensor
    initial_velocity: Tensor


class CAFPipeline(DiffusionPipeline):
    """Few-step generation, inversion and inpainting with constant acceleration: CAF (arXiv 2411.00322), section 4.

    Args:
        velocity: estimates v0 from x at any time, C channels; see :func:`~shiva_ext.caf.model.initial_velocity_model`.
        acceleration: estimates a + 2 v0 from x, t and v0, 2 C channels;
            see :func:`~shiva_ext.caf.model.initial_acceleration_model`.
        scheduler: a :class:`CAFScheduler`.
        vae: decodes latents; without one the networks work on pixels in [-1, 1].

    A call takes N + 1 evaluations of a network: the initial velocity is estimated once. There is no guidance at
    sampling; the pairs that the networks learn from were made with it. Prompts come as embeddings.

    Raises:
        TypeError: a network of a family that is not known here.
        ValueError: the networks' channels do not belong together.
    """

    model_cpu_offload_seq = "velocity->acceleration->vae"
    _optional_components = ["vae"]

    def __init__(
        self, velocity: nn.Module, acceleration: nn.Module, scheduler: CAFScheduler, vae: nn.Module | None = None
    ):
        super().__init__()
        for network in (velocity, acceleration):
            family(network)
        C, wide = velocity.config.in_channels, acceleration.config.in_channels
        if wide != 2 * C:
            raise ValueError(
                f"CAFPipeline: the acceleration network takes {wide} channels, wanted {2 * C}: those of the velocity "
                "network twice (shiva_ext.caf.widen_input makes such a network)"
            )
        self.register_modules(velocity=velocity, acceleration=acceleration, scheduler=scheduler, vae=vae)
        blocks = len(vae.config.block_out_channels) if vae is not None else 1
        self.image_processor = VaeImageProcessor(vae_scale_factor=2 ** (blocks - 1))

    @torch.no_grad()
    def __call__(
        self,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        class_labels: Tensor | None = None,
        num_inference_steps: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        initial_velocity: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Generate one image for each condition: algorithm 2.

        Args:
            prompt_embeds: [B, T, J]; SD3 and PixArt.
            pooled_prompt_embeds: [B, P]; SD3.
            prompt_attention_mask: [B, T]; PixArt.
            class_labels: int64 [B]; DiT.
            num_inference_steps: N; N + 1 evaluations of a network, or N if ``initial_velocity`` is given.
            generator: of the noise.
            latents: noise [B, C, H, W] to begin with; by default drawn at the size that the networks were made for.
            initial_velocity: v0 [B, C, H, W] to take in place of the estimate, as :meth:`invert` gives it.
            output_type: "pil", "np" [B, H, W, C] and "pt" [B, C, H, W] in [0, 1], or "latent": what comes out of the
                networks, without a VAE the image in about [-1, 1], not clamped.
            return_dict: False gives a tuple.

        Raises:
            ValueError: conditions that the networks do not take or that are missing, shapes that do not fit, or an
                ``output_type`` or number of steps that there is not.
        """
        _check_output_type(output_type)
        conditions, B = self._conditions(prompt_embeds, pooled_prompt_embeds, prompt_attention_mask, class_labels)
        if latents is None:
            config = self.velocity.config
            shape = (B, config.in_channels, config.sample_size, config.sample_size)
            latents = randn_tensor(shape, generator=generator, device=self._execution_device)
        x = self._check_latents(latents, B)
        self.scheduler.set_timesteps(num_inference_steps)
        v0 = self._initial_velocity(x, 0.0, conditions) if initial_velocity is None else initial_velocity.to(x)
        x = self._generate(x, v0, conditions)
        images = self._images(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def invert(
        self,
        latents: Tensor,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        class_labels: Tensor | None = None,
        num_inference_steps: int = 1,
    ) -> CAFInversion:
        """The noise that data came from: algorithm 3.

        ``pipe(latents=found.latents, initial_velocity=found.initial_velocity, ...)`` gives the data back.

        Args:
            latents: data [B, C, H, W]: with a VAE its latents, see :meth:`encode`, without one images in [-1, 1].
            num_inference_steps: N; N + 1 evaluations of a network.

        The other arguments, and errors, are those of :meth:`__call__`.
        """
        conditions, B = self._conditions(prompt_embeds, pooled_prompt_embeds, prompt_attention_mask, class_labels)
        x = self._check_latents(latents, B)
        self.scheduler.set_timesteps(num_inference_steps, inverse=True)
        v0 = self._initial_velocity(x, 1.0, conditions)
        found = CAFInversion(self._invert(x, v0, conditions), v0)
        self.maybe_free_model_hooks()
        return found

    @torch.no_grad()
    def inpaint(
        self,
        latents: Tensor,
        mask: Tensor | tuple[int, int, int, int],
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        class_labels: Tensor | None = None,
        num_inference_steps: int = 4,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Fill a hole in data: algorithm 4.

        The hole is filled with noise, the whole inverted, and the hole set to (1 - t) noise after each step on the way
        back, t being the time arrived at; then it is generated from there, with the known values put in again after
        each step. The published code takes the t before the step, and draws the noise afresh each time; with its t one
        step leaves zeros in the hole, not noise. 2 N + 2 evaluations of a network.

        Args:
            latents: data [B, C, H, W] as in :meth:`invert`; what is in the hole does not matter, unless it is NaN.
            mask: of the hole: a box (top, left, height, width) in latents' pixels, or a tensor that can be broadcast to
                [B, C, H, W], true or 1 in the hole.
            num_inference_steps: N.
            generator: of the noise in the hole.

        The other arguments, and errors, are those of :meth:`__call__`.
        """
        _check_output_type(output_type)
        conditions, B = self._conditions(prompt_embeds, pooled_prompt_embeds, prompt_attention_mask, class_labels)
        known = self._check_latents(latents, B)
        hole = _hole(mask, known)
        noise = randn_tensor(known.shape, generator=generator, device=known.device, dtype=known.dtype)
        x = torch.where(hole, noise, known)
        self.scheduler.set_timesteps(num_inference_steps, inverse=True)
        v0 = self._initial_velocity(x, 1.0, conditions)
        x = self._invert(x, v0, conditions, lambda x, t: torch.where(hole, (1 - t) * noise, x))
        self.scheduler.set_timesteps(num_inference_steps)
        v0 = self._initial_velocity(x, 0.0, conditions)
        x = self._generate(x, v0, conditions, lambda x: torch.where(hole, x, known))
        images = self._images(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents of images [B, 3, H, W] in [-1, 1]; without a VAE the images themselves."""
        return images if self.vae is None else recipe_for(self.velocity).encode_images(self, images)

    def _generate(self, x: Tensor, v0: Tensor, conditions: dict, after_step=lambda x: x) -> Tensor:
        for timestep in self.progress_bar(self.scheduler.timesteps):
            a = self._acceleration(x, timestep, conditions, v0)
            x = after_step(self.scheduler.step(a, timestep, x, v0, return_dict=False)[0])
        return x

    def _invert(self, x: Tensor, v0: Tensor, conditions: dict, after_step=lambda x, t: x) -> Tensor:
        for timestep in self.progress_bar(self.scheduler.timesteps):
            a = self._acceleration(x, timestep, conditions, v0)
            x = self.scheduler.invert_step(a, timestep, x, v0, return_dict=False)[0]
            x = after_step(x, self.scheduler.time(timestep) - 1 / self.scheduler.num_inference_steps)
        return x

    def _initial_velocity(self, x: Tensor, t: float, conditions: dict) -> Tensor:
        return predict(self.velocity, x, x.new_full((len(x),), t), conditions, self.scheduler.config.h)

    def _acceleration(self, x: Tensor, timestep: Tensor, conditions: dict, v0: Tensor) -> Tensor:
        t = x.new_full((len(x),), self.scheduler.time(timestep))
        return predict(self.acceleration, x, t, conditions, self.scheduler.config.h, v0)

    def _conditions(self, *given: Tensor | None) -> tuple[dict[str, Tensor], int]:
        """The transformer's arguments, of a method's in the order of ``_ARGUMENTS``, and the batch size."""
        found = {name: value for name, value in zip(_ARGUMENTS, given, strict=True) if value is not None}
        taken = inspect.signature(self.velocity.forward).parameters
        needed = _NEEDED[family(self.velocity)]
        strange = [name for name in found if _ARGUMENTS[name] not in taken]
        sizes = {name: len(value) for name, value in found.items()}
        if not set(needed) <= set(found) or strange or len(set(sizes.values())) != 1:
            raise ValueError(
                f"CAFPipeline: {family(self.velocity)} wants {' and '.join(needed)}, all of one batch size; got "
                + (", ".join(f"{name} of {size}" for name, size in sizes.items()) or "none of them")
            )
        device = self._execution_device
        return {_ARGUMENTS[name]: value.to(device) for name, value in found.items()}, next(iter(sizes.values()))

    def _check_latents(self, latents: Tensor, B: int) -> Tensor:
        C = self.velocity.config.in_channels
        multiple = recipe_for(self.velocity).latent_multiple(self.velocity)
        if latents.ndim != 4 or latents.shape[:2] != (B, C) or any(side % multiple for side in latents.shape[2:]):
            raise ValueError(
                f"CAFPipeline: latents must be [{B}, {C}, H, W] for {B} conditions, H and W multiples of {multiple}; "
                f"got {list(latents.shape)}"
            )
        # The state between steps is at least float32, whatever the networks' dtype.
        return latents.to(self._execution_device, torch.promote_types(latents.dtype, torch.float32))

    def _images(self, x: Tensor, output_type: str):
        if output_type == "latent":
            return x
        if self.vae is not None:
            x = recipe_for(self.velocity).decode_images(self.vae, x)
        return self.image_processor.postprocess(x.float(), output_type=output_type)


def _check_output_type(output_type: str) -> None:
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"CAFPipeline: output_type is {output_type!r}, wanted 'pil', 'np', 'pt' or 'latent'")


def _hole(mask: Tensor | tuple[int, int, int, int], like: Tensor) -> Tensor:
    """bool, broadcastable to ``like`` [B, C, H, W]."""
    H, W = like.shape[2:]
    if not torch.is_tensor(mask):
        top, left, height, width = mask
        if min(top, left) < 0 or min(height, width) < 1 or top + height > H or left + width > W:
            raise ValueError(
                f"CAFPipeline: the box is {tuple(mask)}, wanted (top, left, height, width) inside {H} x {W} pixels"
            )
        found = torch.zeros(1, 1, H, W, dtype=torch.bool, device=like.device)
        found[..., top : top + height, left : left + width] = True
        return found
    try:
        torch.broadcast_to(mask, like.shape)
    except RuntimeError as error:
        raise ValueError(
            f"CAFPipeline: the mask is {list(mask.shape)}, wanted one that can be broadcast to {list(like.shape)}"
        ) from error
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("CAFPipeline: the mask has values other than 0 and 1; 1 is in the hole")
    return mask.to(like.device).bool()
