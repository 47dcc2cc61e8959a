"""The three stages on a tiny model: what each trains, what it leaves alone, and what comes out."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import SD3Transformer2DModel

import shiva_ext
from shiva_ext.selection import ESTIMATORS, get_estimator
from shiva_ext.training.config import TrainConfig
from shiva_ext.training.stages import run_student, run_teacher
from shiva_ext.training.trainer import Batch, ShivaTrainer

from .runs import everything, make_trainer

CONFIG = TrainConfig(
    router_steps=2,
    policy_steps=2,
    joint_steps=2,
    batch_size=4,
    micro_batches=2,
    adapter_rank=4,
    output_weight=1.0,
    lr_router=1e-2,
    lr_policy=1e-2,
    lr_adapter=1e-2,
)


def tiny_model() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=1,
        out_channels=1,
        num_layers=4,
        num_attention_heads=1,
        attention_head_dim=64,
        joint_attention_dim=16,
        caption_projection_dim=64,
        pooled_projection_dim=16,
        pos_embed_max_size=4,
    )
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    # torch picks other CPU kernels for weights that require a gradient, even under no_grad: the last bits differ.
    return model.eval().requires_grad_(False)


def next_batch(count: int, generator: torch.Generator) -> Batch:
    def draw(*shape):
        return torch.randn(count, *shape, generator=generator)

    return Batch(draw(1, 8, 8), dict(encoder_hidden_states=draw(3, 16), pooled_projections=draw(16)))


def inputs(count: int = 2) -> dict:
    batch = next_batch(count, torch.Generator().manual_seed(3))
    return dict(
        hidden_states=batch.latents,
        **batch.conditions,
        timestep=torch.full((count,), 400.0),
    )


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def changed(module: torch.nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(p, before[name]) for name, p in module.named_parameters() if name in before)


@pytest.fixture
def trainer():
    trainer = ShivaTrainer(tiny_model(), CONFIG, next_batch)
    yield trainer
    trainer.close()


def test_each_stage_trains_what_it_names_and_nothing_else(trainer):
    backbone, router, policy = (weights(m) for m in (trainer.transformer, trainer.router, trainer.policy))
    trainer.run_stage("router", 2)
    assert changed(trainer.router, router) and not changed(trainer.policy, policy)
    router = weights(trainer.router)
    trainer.run_stage("policy", 2)
    assert changed(trainer.router, router) and changed(trainer.policy, policy)
    assert not changed(trainer.transformer, backbone)
    trainer.run_stage("joint", 2)
    trained = {name for name, p in trainer.transformer.named_parameters() if p.requires_grad}
    assert trained and all("lora" in name for name in trained)
    base = {name.replace(".base_layer", ""): p for name, p in trainer.transformer.named_parameters()}
    assert all(torch.equal(base[name], value) for name, value in backbone.items())


def test_every_attention_and_mlp_linear_of_the_blocks_gets_an_adapter(trainer):
    linears = {n for n, m in trainer.transformer.transformer_blocks.named_modules() if isinstance(m, torch.nn.Linear)}
    wanted = {n for n in linears if ".attn." in n or ".ff" in n}
    trainer.add_adapters()
    names = {n for n, _ in trainer.transformer.transformer_blocks.named_parameters() if "lora_A" in n}
    assert {n.split(".lora_A")[0] for n in names} == wanted


def test_an_export_can_be_enabled_and_closing_restores_the_model(tmp_path):
    model = tiny_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        dense = model(**inputs(), return_dict=False)[0]
    trainer = ShivaTrainer(model, CONFIG, next_batch)
    for stage in ("router", "policy", "joint"):
        trainer.run_stage(stage, 2)
    trainer.export(tmp_path)
    trainer.close()
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in before.items()}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert json.loads((tmp_path / "config.json").read_text())["metadata"]["training"]["budget"] == CONFIG.budget
    with torch.no_grad():
        assert torch.equal(model(**inputs(), return_dict=False)[0], dense)
        with shiva_ext.enable(model, tmp_path):
            assert not torch.equal(model(**inputs(), return_dict=False)[0], dense)
            assert shiva_ext.summary(model).mean_ratio == pytest.approx(CONFIG.budget, abs=1 / 16)
        assert torch.equal(model(**inputs(), return_dict=False)[0], dense)


def test_the_teacher_is_the_dense_model_and_its_updates_telescope():
    model = tiny_model()
    with torch.no_grad():
        dense = model(**inputs(), return_dict=False)[0]
    trainer = ShivaTrainer(model, CONFIG, next_batch)
    trainer.add_adapters()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    teacher = run_teacher(model, trainer.state, **inputs())
    assert torch.equal(teacher.output, dense)
    assert sorted(teacher.tokens) == [1, 2, 3]
    for layer in (1, 2):
        assert torch.equal(teacher.tokens[layer][1], teacher.tokens[layer + 1][0])
        assert torch.equal(teacher.update(layer), teacher.tokens[layer][1] - teacher.tokens[layer][0])
    trainer.close()


@pytest.mark.parametrize("name", ["counterfactual", "residual", "residual_flipped"])
def test_gradients_reach_router_and_ratios_through_every_estimator(name):
    trainer = ShivaTrainer(tiny_model(), replace(CONFIG, estimator=name), next_batch)
    ratios = torch.tensor([1.0, 0.6, 0.5, 0.7], requires_grad=True)
    teacher = run_teacher(trainer.transformer, trainer.state, **inputs())
    output, student = run_student(trainer.transformer, trainer.state, get_estimator(name), ratios, teacher, **inputs())
    assert {layer: kept.shape[1] for layer, kept in student.kept.items()} == {1: 9, 2: 8, 3: 11}
    (output - teacher.output).square().mean().backward()
    assert (ratios.grad[1:] != 0).all() and ratios.grad[0] == 0
    missing = [n for n, p in trainer.router.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing
    trainer.close()


def test_the_router_sends_no_gradient_into_the_backbone(monkeypatch):
    trainer = ShivaTrainer(tiny_model(), CONFIG, next_batch)
    seen = []
    forward = trainer.router.forward

    def watch(layer, x, *embeddings):
        seen.append(x.requires_grad)
        return forward(layer, x, *embeddings)

    monkeypatch.setattr(trainer.router, "forward", watch)
    trainer.add_adapters()
    teacher = run_teacher(trainer.transformer, trainer.state, **inputs())
    ratios = torch.full((4,), 0.5)
    run_student(trainer.transformer, trainer.state, get_estimator("residual"), ratios, teacher, **inputs())
    assert seen == [False, False, False]
    trainer.close()


def test_a_loss_that_is_not_finite_stops_the_training_with_advice(trainer):
    def broken(count, generator):
        batch = next_batch(count, generator)
        return batch._replace(latents=batch.latents * float("nan"))

    trainer.next_batch, trainer.config = broken, replace(CONFIG, max_bad_steps=0)
    with pytest.raises(FloatingPointError, match="learning rates"):
        trainer.run_stage("router", 1)


def test_a_batch_that_micro_batches_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="multiple of micro_batches"):
        TrainConfig(batch_size=6, micro_batches=4)


def test_the_control_run_trains_adapters_alone_and_prunes_nothing(tmp_path):
    model = tiny_model()
    trainer = ShivaTrainer(model, CONFIG, next_batch, dense=True)
    router = weights(trainer.router)
    trainer.run_stage("joint", 2)
    assert not changed(trainer.router, router)
    trainer.export(tmp_path)
    trainer.close()
    with shiva_ext.enable(model, tmp_path):
        assert shiva_ext.summary(model).mean_ratio == 1


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_temperatures_go_as_far_as_they_are_told(share):
    config = replace(CONFIG, router_steps=2, policy_steps=1, joint_steps=2, anneal_to=share)
    trainer, seen = ShivaTrainer(tiny_model(), config, next_batch), []
    trainer.after_step = lambda *_: seen.append(trainer.estimator.progress)
    trainer.run()
    trainer.close()
    assert seen == pytest.approx([share * step / 5 for step in range(5)])
    with pytest.raises(ValueError, match="anneal_to is 1.5"):
        TrainConfig(anneal_to=1.5)


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_the_budget_loss_sees_the_whole_batch_once_a_step(micro_batches):
    config = replace(CONFIG, micro_batches=micro_batches, budget=0.6, budget_weight=3.0, adapter_rank=0)
    trainer = ShivaTrainer(tiny_model(), config, next_batch)
    seen = []
    trainer.budget_loss.register_forward_hook(lambda module, args, loss: seen.append((args[0].detach(), loss.item())))
    trainer.run_stage("joint", 3)
    trainer.close()
    mu = config.budget
    assert len(seen) == 3
    for ratios, loss in seen:
        assert ratios.shape == (config.batch_size, 4)
        mean = ratios[:, 1:].mean().item()
        mu = 0.2 * mean + 0.8 * mu
        assert loss == pytest.approx(3.0 * mean * 2 * (mu - config.budget), abs=1e-6)
    assert trainer.budget_loss.mu.item() == pytest.approx(mu)


def test_the_budget_gradient_does_not_depend_on_the_number_of_micro_batches():
    def gradient(micro_batches: int) -> list[torch.Tensor]:
        config = replace(CONFIG, micro_batches=micro_batches, budget=0.3, adapter_rank=0)
        trainer = ShivaTrainer(tiny_model(), config, next_batch)
        trainer.budget_term(torch.linspace(0.1, 0.9, config.batch_size)).backward()
        trainer.close()
        return [p.grad for p in trainer.policy.parameters() if p.grad is not None]

    for one, two in zip(gradient(1), gradient(4), strict=True):
        torch.testing.assert_close(one, two)


def test_an_artefact_trained_to_share_its_selection_says_so_and_keeps_equal_counts(tmp_path):
    trainer = ShivaTrainer(tiny_model(), replace(CONFIG, share_selection=True, share=3), next_batch)
    trainer.run_stage("policy", 2)
    artifact = trainer.export(tmp_path)
    trainer.close()
    assert artifact.share_selection and shiva_ext.load(tmp_path).share_selection
    assert all(len(set(row[1:])) == 1 for row in map(artifact.ratios, artifact.table.sigmas))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_trains_through_all_stages(name):
    trainer = make_trainer(estimator=name, router_steps=1, policy_steps=1, joint_steps=1)
    before = everything(trainer)
    trainer.run()
    after = everything(trainer)
    assert all(torch.isfinite(value).all() for value in after.values()) and trainer.bad_steps == 0
    for part in ("router.", "schedule."):
        assert any(not torch.equal(before[key], after[key]) for key in before if key.startswith(part))


@pytest.mark.parametrize("first_layer", [0, 2])
def test_the_blocks_that_stay_dense_are_those_that_were_asked_for(first_layer, tmp_path):
    config = replace(CONFIG, first_layer=first_layer, budget=0.5)
    model = tiny_model()
    trainer = ShivaTrainer(model, config, next_batch)
    trainer.run()
    pruned = [layer for layer, count in trainer.kept.items() if count < 16]
    trainer.export(tmp_path)
    trainer.close()
    assert pruned == list(range(first_layer, 4))
    artifact = shiva_ext.load(tmp_path)
    assert all(set(row[:first_layer]) <= {1.0} for row in map(artifact.ratios, artifact.table.sigmas))
    assert artifact.table.mean() == pytest.approx(0.5, abs=1 / 16)
    with shiva_ext.enable(model, tmp_path, batched_guidance=False) as handle:
        handle.record()
        model(**inputs(), return_dict=False)
        assert sorted(handle.records[0]["kept"]) == list(range(first_layer, 4))


@pytest.mark.parametrize("first_layer, wanted", [(-1, "from 0 on"), (4, "wanted 0 to 3")])
def test_a_model_of_which_nothing_would_be_pruned_is_refused(first_layer, wanted):
    with pytest.raises(ValueError, match=wanted):
        ShivaTrainer(tiny_model(), replace(CONFIG, first_layer=first_layer), next_batch)
