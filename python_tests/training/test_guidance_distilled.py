"""Guidance learned by the student: what the teacher gives, what is left of the loss, and who may not guide it."""

from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

import shiva_ext
from shiva_ext.training.method_trainer import MethodTrainer
from shiva_ext.training.trainer import Batch, ShivaTrainer

from .test_trainer import CONFIG, next_batch, tiny_model

GUIDED = replace(CONFIG, guidance=3.0)
EMPTY = dict(encoder_hidden_states=torch.full((1, 3, 16), 0.3), pooled_projections=torch.full((1, 16), -0.2))


def source(count: int, generator: torch.Generator) -> Batch:
    return next_batch(count, generator)._replace(empty=EMPTY)


def trainer(config=GUIDED, batches=source, cls=ShivaTrainer, **options):
    return cls(tiny_model(), replace(config, precision="fp32"), batches, **options)


def test_the_teacher_is_the_guided_dense_model():
    ours = trainer()
    call = ours.call(torch.tensor([0.3, 0.8]), torch.Generator().manual_seed(0))
    given = ours.run_teacher(call).output
    ours.close()
    model = tiny_model()
    with torch.no_grad():
        prompted = model(**call.inputs, return_dict=False)[0]
        empty = {name: value.expand(2, *value.shape[1:]) for name, value in EMPTY.items()}
        unprompted = model(**call.inputs | empty, return_dict=False)[0]
    torch.testing.assert_close(given, unprompted + 3.0 * (prompted - unprompted), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(given, prompted, atol=1e-3)


@pytest.mark.parametrize(("cls", "method"), [(ShivaTrainer, "shiva"), (MethodTrainer, "diffcr")])
def test_the_models_own_loss_is_left_out(cls, method):
    ours = trainer(replace(GUIDED, method=method, diffusion_weight=5.0, feature_weight=0.0), cls=cls)
    ours.add_adapters()
    drawn = ours.draw(torch.Generator().manual_seed(0))[0]
    total, record = ours.loss("joint", drawn, torch.Generator().manual_seed(1))
    ours.close()
    own = record.get("own", torch.tensor(0.0))
    torch.testing.assert_close((total - own).detach(), record["output"], atol=1e-5, rtol=1e-4)


def test_the_dense_control_learns_the_guided_output():
    ours = trainer(replace(GUIDED, joint_steps=30, lr_adapter=5e-3, log_every=5), dense=True)
    ours.run_stage("joint", 30)
    ours.close()
    errors = [entry["output"] for entry in ours.history]
    assert errors[-1] < errors[0] and "diffusion" not in ours.history[0]


def test_a_source_without_the_empty_prompt_is_refused():
    ours = trainer(batches=next_batch)
    with pytest.raises(ValueError, match="wanted them as Batch.empty"):
        ours.call(torch.tensor([0.3, 0.8]), torch.Generator().manual_seed(0))
    ours.close()


@pytest.mark.parametrize("settings", [dict(guidance=0.5), dict(guidance=1.0), dict(guidance=2.0, output_weight=0.0)])
def test_settings_that_cannot_be_learned_are_refused(settings):
    with pytest.raises(ValueError, match="guidance is .* wanted a scale above 1"):
        replace(CONFIG, **settings)


def test_an_artefact_that_guides_itself_is_not_guided_again(tmp_path):
    ours = trainer()
    ours.run(tmp_path / "checkpoints")
    ours.export(tmp_path / "artefact")
    ours.close()
    assert shiva_ext.load(tmp_path / "artefact").guidance == 3.0
    model = tiny_model()
    with pytest.raises(ValueError, match=r"guided at scale 3 in one call.*guidance_scale=1"):
        shiva_ext.enable(model, tmp_path / "artefact", batched_guidance=True)
    encoders = dict.fromkeys(
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3", "vae")
    )
    pipe = StableDiffusion3Pipeline(transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(), **encoders)
    call = dict(
        prompt_embeds=torch.zeros(1, 3, 16), pooled_prompt_embeds=torch.zeros(1, 16), height=64, width=64,
        negative_prompt_embeds=torch.zeros(1, 3, 16), negative_pooled_prompt_embeds=torch.zeros(1, 16),
        num_inference_steps=2, output_type="latent",
    )  # fmt: skip
    with shiva_ext.enable(pipe, tmp_path / "artefact"):
        assert torch.isfinite(pipe(**call, guidance_scale=1.0)[0]).all()
        with pytest.raises(ValueError, match="guidance_scale=1"):
            pipe(**call, guidance_scale=4.0)
        assert torch.isfinite(pipe(**call, guidance_scale=1.0)[0]).all()
    assert torch.isfinite(pipe(**call, guidance_scale=4.0)[0]).all()
