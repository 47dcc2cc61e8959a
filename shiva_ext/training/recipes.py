"""How each family is called in training: its encoders, its inputs, and where its prediction is."""

import inspect
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Recipe(ABC):
    """A family whose latents [B,C,H,W] go into the transformer as they are.

    Conditions are the transformer's own arguments, by name; the first axis is the batch's.
    """

    def encode_images(self, pipe, pixels: Tensor) -> Tensor:
        """Latents of images [B,3,H,W] in [-1, 1], as the transformer is used to: the mode, not a draw."""
        vae = pipe.vae
        latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
        return (latents - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor

    def decode_images(self, vae, latents: Tensor) -> Tensor:
        """Images [B,3,H,W] of latents; the reverse of :meth:`encode_images`."""
        latents = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
        return vae.decode(latents.to(vae.device, vae.dtype)).sample

    @abstractmethod
    def encode_prompts(self, pipe, captions: list[str]) -> dict[str, Tensor]:
        """Conditions [B,...] of B captions, by argument; ``""`` is the empty prompt."""

    def inputs(self, transformer: nn.Module, noisy: Tensor, timestep: Tensor, conditions: dict[str, Tensor]) -> dict:
        """The transformer's arguments; timestep [B] goes from 0 to 1000."""
        return dict(hidden_states=noisy, timestep=timestep, **conditions)

    def latent_multiple(self, transformer: nn.Module) -> int:
        """What the sides of the latents must be multiples of."""
        patch = transformer.config.patch_size
        return patch if isinstance(patch, int) else patch[-1]

    def prediction(self, output: Tensor, noisy: Tensor) -> Tensor:
        """The part of the transformer's output that has the shape of the noisy latents; the rest is variance."""
        return output[:, : noisy.shape[1]]


class SD3Recipe(Recipe):
    """Tokens of all text encoders together, and a pooled prompt."""

    def encode_prompts(self, pipe, captions):
        tokens, _, pooled, _ = pipe.encode_prompt(captions, captions, captions, do_classifier_free_guidance=False)
        return dict(encoder_hidden_states=tokens, pooled_projections=pooled)


def _pack(latents: Tensor) -> Tensor:
    """[B,C,H,W] -> [B,(H/2)(W/2),4C], patches of 2 x 2 as tokens."""
    B, C, H, W = latents.shape
    patches = latents.view(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(B, H // 2 * (W // 2), 4 * C)


def _unpack(tokens: Tensor, shape: torch.Size) -> Tensor:
    """The reverse of :func:`_pack`, for latents of this shape."""
    B, C, H, W = shape
    return tokens.view(B, H // 2, W // 2, C, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)


class FluxRecipe(Recipe):
    """Latents go in as packed patches of 2 x 2 with their places; timesteps from 0 to 1."""

    GUIDANCE = 3.5  # the pipeline's default, for models that are told how strongly to guide

    def encode_prompts(self, pipe, captions):
        tokens, pooled, _ = pipe.encode_prompt(captions, captions)
        return dict(encoder_hidden_states=tokens, pooled_projections=pooled)

    def latent_multiple(self, transformer):
        return 2

    def inputs(self, transformer, noisy, timestep, conditions):
        B, _, H, W = noisy.shape
        rows, columns = torch.meshgrid(torch.arange(H // 2), torch.arange(W // 2), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
        T = conditions["encoder_hidden_states"].shape[1]
        guidance = noisy.new_full((B,), self.GUIDANCE) if transformer.config.guidance_embeds else None
        return dict(
            hidden_states=_pack(noisy),
            timestep=timestep / 1000,
            img_ids=places.to(noisy),
            txt_ids=noisy.new_zeros(T, 3),
            guidance=guidance,
            **conditions,
        )

    def prediction(self, output, noisy):
        return _unpack(output, noisy.shape)


class PixArtRecipe(Recipe):
    """Prompts with their mask; alpha is told the image's size, too. Half of the output is variance."""

    def encode_prompts(self, pipe, captions):
        tokens, mask, _, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, clean_caption=True)
        return dict(encoder_hidden_states=tokens, encoder_attention_mask=mask)

    def inputs(self, transformer, noisy, timestep, conditions):
        size: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if transformer.use_additional_conditions:
            B, _, H, W = noisy.shape
            size["resolution"] = noisy.new_tensor([8 * H, 8 * W]).repeat(B, 1)
            size["aspect_ratio"] = noisy.new_tensor([H / W]).repeat(B, 1)
        return dict(hidden_states=noisy, timestep=timestep, added_cond_kwargs=size, **conditions)


class DiTRecipe(Recipe):
    """Captions are class names or numbers; the empty prompt is the class behind the last."""

    def encode_prompts(self, pipe, captions):
        empty = pipe.transformer.config.num_embeds_ada_norm
        names = {name: number for name, number in getattr(pipe, "labels", {}).items()} | {"": empty}
        unknown = [c for c in captions if c not in names and not (c.isdigit() and int(c) < empty)]
        if unknown:
            raise ValueError(
                f"shiva_ext: the caption {unknown[0]!r} is neither a class of the model nor a number below {empty}"
            )
        return dict(class_labels=torch.tensor([names[c] if c in names else int(c) for c in captions]))


class SanaRecipe(Recipe):
    """Prompts with their mask; an autoencoder without a distribution; timesteps on the model's own scale."""

    def encode_images(self, pipe, pixels):
        vae = pipe.vae
        return vae.encode(pixels.to(vae.device, vae.dtype)).latent * vae.config.scaling_factor

    def encode_prompts(self, pipe, captions):
        """With the instruction that the pipeline puts before a prompt, and not before the empty one."""
        default = inspect.signature(type(pipe).__call__).parameters.get("complex_human_instruction")
        instruction = None if default is None or not all(captions) else default.default
        tokens, mask, _, _ = pipe.encode_prompt(
            captions, do_classifier_free_guidance=False, complex_human_instruction=instruction
        )
        return dict(encoder_hidden_states=tokens, encoder_attention_mask=mask)

    def inputs(self, transformer, noisy, timestep, conditions):
        more = dict(guidance=noisy.new_full((len(noisy),), 4.5)) if transformer.config.guidance_embeds else {}
        timestep = timestep * transformer.config.timestep_scale
        return dict(hidden_states=noisy, timestep=timestep, **conditions, **more)


class _VideoVae(Recipe):
    """An autoencoder of videos [B,C,T,H,W] with a mean and a spread for each channel; an image is one frame."""

    @staticmethod
    def _statistics(vae, latents: Tensor) -> tuple[Tensor, Tensor]:
        values = (vae.config.latents_mean, vae.config.latents_std)
        mean, std = (torch.tensor(each).view(1, -1, 1, 1, 1).to(latents) for each in values)
        return mean, std

    def encode_images(self, pipe, pixels):
        vae = pipe.vae
        latents = vae.encode(pixels.unsqueeze(2).to(vae.device, vae.dtype)).latent_dist.mode()
        mean, std = self._statistics(vae, latents)
        return (latents - mean) / std

    def decode_images(self, vae, latents):
        mean, std = self._statistics(vae, latents)
        return vae.decode((latents * std + mean).to(vae.device, vae.dtype)).sample[:, :, 0]


class QwenImageRecipe(_VideoVae):
    """Latents go in as packed patches of 2 x 2; prompts with their mask; timesteps from 0 to 1."""

    def encode_images(self, pipe, pixels):
        return super().encode_images(pipe, pixels).squeeze(2)

    def decode_images(self, vae, latents):
        return super().decode_images(vae, latents.unsqueeze(2))

    def encode_prompts(self, pipe, captions):
        tokens, mask = pipe.encode_prompt(captions)
        mask = torch.ones(tokens.shape[:2], dtype=torch.long) if mask is None else mask
        return dict(encoder_hidden_states=tokens, encoder_hidden_states_mask=mask)

    def inputs(self, transformer, noisy, timestep, conditions):
        B, _, H, W = noisy.shape
        shapes = [[(1, H // 2, W // 2)]] * B
        return dict(hidden_states=_pack(noisy), timestep=timestep / 1000, img_shapes=shapes, **conditions)

    def prediction(self, output, noisy):
        return _unpack(output, noisy.shape)


class WanRecipe(_VideoVae):
    """Images are videos of one frame, latents [B,C,1,H,W]; prompts of 512 tokens, as the pipeline fills them up."""

    def encode_prompts(self, pipe, captions):
        tokens, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=512)
        return dict(encoder_hidden_states=tokens)


RECIPES: dict[str, type[Recipe]] = {
    "DiTTransformer2DModel": DiTRecipe,
    "FluxTransformer2DModel": FluxRecipe,
    "PixArtTransformer2DModel": PixArtRecipe,
    "QwenImageTransformer2DModel": QwenImageRecipe,
    "SD3Transformer2DModel": SD3Recipe,
    "SanaTransformer2DModel": SanaRecipe,
    "WanTransformer3DModel": WanRecipe,
}


def recipe_for(transformer: nn.Module) -> Recipe:
    """The recipe of a transformer, by the name of its class or of one it inherits from.

    Raises:
        TypeError: there is none; the message lists the families there are.
    """
    for cls in type(transformer).__mro__:
        if cls.__name__ in RECIPES:
            return RECIPES[cls.__name__]()
    raise TypeError(
        f"shiva_ext cannot train {type(transformer).__name__}; it knows {', '.join(sorted(RECIPES))}. A new family is "
        "one small class in shiva_ext/training/recipes.py, see CONTRIBUTING.md"
    )
