"""Every family can be trained: its inputs, its prediction, one step of each stage, and the artefact."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline
from models import families, test_flux, test_pixart, tiny

import shiva_ext
from shiva_ext.training.config import TrainConfig
from shiva_ext.training.objectives import objective_for
from shiva_ext.training.observe import probe
from shiva_ext.training.recipes import RECIPES, _pack, _unpack, recipe_for
from shiva_ext.training.trainer import Batch, ShivaTrainer

FLOW, DIFFUSION = FlowMatchEulerDiscreteScheduler, DDPMScheduler
TEXT, PROMPT = families.TEXT, families.PROMPT


def prompt(draw, count, length=TEXT, **more):
    return dict(encoder_hidden_states=draw(count, length, PROMPT), **more)


CASES = {
    "sd3": (
        tiny.make_model, FLOW, (4, 8, 8),
        lambda draw, n: dict(encoder_hidden_states=draw(n, 3, 16), pooled_projections=draw(n, 24)),
    ),
    "flux": (
        lambda: test_flux.make_model(guidance_embeds=True), FLOW, (4, 8, 8),
        lambda draw, n: prompt(draw, n, 3, pooled_projections=draw(n, 20)),
    ),
    "pixart": (
        test_pixart.make_model, DIFFUSION, (4, 8, 8),
        lambda draw, n: prompt(draw, n, encoder_attention_mask=torch.ones(n, TEXT)),
    ),
    "pixart alpha": (
        lambda: test_pixart.make_model(use_additional_conditions=True, attention_head_dim=96, cross_attention_dim=96),
        DIFFUSION, (4, 8, 8),
        lambda draw, n: prompt(draw, n, encoder_attention_mask=torch.ones(n, TEXT)),
    ),
    "dit": (families.build_dit, DIFFUSION, (4, 8, 8), lambda draw, n: dict(class_labels=torch.arange(n) % 10)),
    "sana": (
        families.build_sana, FLOW, (4, 4, 6),
        lambda draw, n: prompt(draw, n, encoder_attention_mask=torch.ones(n, TEXT)),
    ),
    "sana with guidance": (
        lambda: families.build_sana(guidance_embeds=True, timestep_scale=0.001), FLOW, (4, 4, 6),
        lambda draw, n: prompt(draw, n, encoder_attention_mask=torch.ones(n, TEXT)),
    ),
    "qwenimage": (
        families.build_qwen, FLOW, (4, 8, 8),
        lambda draw, n: prompt(draw, n, encoder_hidden_states_mask=torch.ones(n, TEXT, dtype=torch.long)),
    ),
    "wan": (families.build_wan, FLOW, (4, 3, 4, 8), prompt),
}  # fmt: skip
CONFIG = TrainConfig(
    budget=0.5, router_steps=1, policy_steps=1, joint_steps=2, batch_size=4, micro_batches=2, adapter_rank=2,
    output_weight=1.0, lr_router=1e-2, lr_policy=1e-2, lr_adapter=1e-2, precision="fp32", log_every=1,
)  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", CASES)
def test_all_stages_train_and_the_artefact_can_be_enabled(name, checkpointing, tmp_path):
    build, scheduler, shape, conditions = CASES[name]
    model = build().requires_grad_(False)

    def next_batch(count, generator):
        def draw(*shape):
            return torch.randn(shape, generator=generator)

        return Batch(draw(count, *shape), conditions(draw, count))

    config = TrainConfig(**{**vars(CONFIG), "gradient_checkpointing": checkpointing})
    trainer = ShivaTrainer(model, config, next_batch, objective=objective_for(scheduler()))
    before = {key: p.clone() for key, p in trainer.router.named_parameters()}
    trainer.run()
    assert len(trainer.history) == 4
    assert all(value == value for entry in trainer.history for value in entry.values())
    assert any(not torch.equal(p, before[key]) for key, p in trainer.router.named_parameters())
    adapters = trainer._adapter_weights()
    changed = [key for key, p in adapters.items() if "lora_B" in key and p.any()]
    assert changed and all("blocks." in key for key in adapters)
    probes = probe(trainer)
    assert len(probes) == 3 and all(probe["kept"] for probe in probes)
    trainer.export(tmp_path)
    trainer.close()
    if checkpointing:
        return
    batch = next_batch(2, torch.Generator().manual_seed(1))
    inputs = recipe_for(model).inputs(model, batch.latents, torch.full((2,), 500), batch.conditions)
    with torch.no_grad():
        dense = model(**inputs, return_dict=False)[0]
        with shiva_ext.enable(model, tmp_path):
            assert not torch.equal(model(**inputs, return_dict=False)[0], dense)
        assert torch.equal(model(**inputs, return_dict=False)[0], dense)


@pytest.mark.parametrize("name", CASES)
def test_the_prediction_has_the_shape_of_the_latents(name):
    build, _, shape, conditions = CASES[name]
    model, noisy = build(), torch.randn(2, *shape)
    recipe = recipe_for(model)
    inputs = recipe.inputs(model, noisy, torch.full((2,), 500), conditions(torch.randn, 2))
    with torch.no_grad():
        assert recipe.prediction(model(**inputs, return_dict=False)[0], noisy).shape == noisy.shape


def test_patches_are_packed_as_the_pipelines_pack_them():
    latents = torch.randn(2, 4, 6, 8)
    packed = FluxPipeline._pack_latents(latents, 2, 4, 6, 8)
    assert torch.equal(_pack(latents), packed)
    assert torch.equal(_unpack(packed, latents.shape), FluxPipeline._unpack_latents(packed, 48, 64, 8))
    assert torch.equal(_unpack(packed, latents.shape), latents)


def test_a_tuned_adapter_reaches_every_attention_and_mlp_linear_of_the_blocks():
    for name, (build, _, _, _) in CASES.items():
        model = build()
        trainer = ShivaTrainer(model, CONFIG, lambda *args: None)
        blocks = dict.fromkeys(
            n for b in trainer.state.adapter.blocks(model) for n, m in model.named_modules() if m is b
        )
        wanted = {
            n
            for n, m in model.named_modules()
            if isinstance(m, torch.nn.Linear)
            and any(n.startswith(b + ".") for b in blocks)
            and not any(part in n for part in ("norm", "img_mod", "txt_mod", ".emb."))
        }
        trainer.add_adapters()
        got = {n.split(".lora_A")[0] for n in trainer._adapter_weights() if "lora_A" in n}
        assert got == wanted, name
        trainer.close()


def test_a_family_that_cannot_be_trained_is_named():
    with pytest.raises(TypeError, match="cannot train Linear; it knows DiT"):
        recipe_for(torch.nn.Linear(1, 1))


class MirrorVae:
    """An autoencoder that changes nothing, with the statistics that families have."""

    device, dtype = torch.device("cpu"), torch.float32
    config = SimpleNamespace(scaling_factor=1.5, shift_factor=0.25, latents_mean=[0.5] * 3, latents_std=[2.0] * 3)

    def encode(self, pixels):
        return SimpleNamespace(latent=pixels, latent_dist=SimpleNamespace(mode=lambda: pixels))

    def decode(self, latents):
        return SimpleNamespace(sample=latents)


@pytest.mark.parametrize("name", RECIPES)
def test_decoding_undoes_encoding(name):
    recipe, vae, pixels = RECIPES[name](), MirrorVae(), torch.randn(2, 3, 8, 8)
    if name == "SanaTransformer2DModel":  # its autoencoder has no shift
        vae.config = SimpleNamespace(scaling_factor=0.4)
    latents = recipe.encode_images(SimpleNamespace(vae=vae), pixels)
    assert not torch.allclose(latents.flatten(), pixels.flatten())
    torch.testing.assert_close(recipe.decode_images(vae, latents), pixels)
