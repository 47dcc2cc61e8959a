"""Training the other methods: the loop is Shiva's, the weights and the loss are theirs."""

import os
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from models.test_pixart import make_model as build_pixart
from processes import free_port, run_two

import shiva_ext
from shiva_ext.methods import TRAINED, DiffCR, DyDiT, SparseDiT
from shiva_ext.training.config import TrainConfig
from shiva_ext.training.loop import Batch
from shiva_ext.training.method_trainer import MethodTrainer
from shiva_ext.training.objectives import objective_for

from .runs import CONFIG, losses, next_batch, tiny_model
from .test_recipes import CASES

SETTINGS = {
    "diffcr": DiffCR(budget=0.5, regions=2),
    "dydit": DyDiT(budget=0.5, groups=4, width_bias=0.5, token_bias=0.5, ramp=0.0),
    # At the lowest noise levels the coarse grid is the image's own, and recovery's weights are not used.
    "sparsedit": SparseDiT(high=0.75, low=0.2, roles=("generate", "sparse", "recover")),
}


def make_trainer(name, **changes):
    torch.manual_seed(1)
    config = replace(CONFIG, method=name, joint_steps=6, micro_batches=2, **changes)
    model = tiny_model() if name != "dydit" else two_heads()
    return MethodTrainer(model, config, next_batch, SETTINGS[name])


def two_heads():
    model = tiny_model()
    config = dict(model.config) | dict(num_attention_heads=2, attention_head_dim=16)
    torch.manual_seed(0)
    model = type(model)(**{k: v for k, v in config.items() if not k.startswith("_")})
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", TRAINED)
def test_every_weight_learns_and_the_artefact_runs(name, checkpointing, tmp_path):
    trainer = make_trainer(name, gradient_checkpointing=checkpointing)
    before = {key: p.detach().clone() for key, p in trainer.weights.named_parameters()}
    trainer.run()
    assert all(value == value for entry in trainer.history for value in entry.values())
    still = [key for key, p in trainer.weights.named_parameters() if torch.equal(p, before[key])]
    assert not still, still
    assert any("lora_B" in key and p.any() for key, p in trainer._adapter_weights().items())
    artifact = trainer.export(tmp_path)
    trainer.close()
    model = trainer.transformer
    batch = next_batch(2, torch.Generator().manual_seed(1))
    inputs = dict(hidden_states=batch.latents, timestep=torch.full((2,), 500.0), **batch.conditions, return_dict=False)
    with torch.no_grad():
        dense = model(**inputs)[0]
        with shiva_ext.enable(model, tmp_path):
            pruned = model(**inputs)[0]
        with shiva_ext.enable(model, artifact):
            assert torch.equal(model(**inputs)[0], pruned)
        assert not torch.equal(pruned, dense) and torch.equal(model(**inputs)[0], dense)
    assert artifact.metadata["training"]["method"] == name


@pytest.mark.parametrize("name", TRAINED)
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(name, tmp_path):
    whole = make_trainer(name)
    whole.run()
    part = make_trainer(name)
    part.run_stage("joint", 3, checkpoints=tmp_path)
    rest = make_trainer(name)
    rest.run(tmp_path, resume=True)
    assert losses(rest)[-1] == losses(whole)[-1]
    for key, value in whole.weights.state_dict().items():
        assert torch.equal(value, rest.weights.state_dict()[key]), key


def test_a_run_is_not_resumed_with_other_settings_of_the_method(tmp_path):
    trainer = make_trainer("diffcr")
    trainer.run_stage("joint", 3, checkpoints=tmp_path)
    trainer.close()
    other = MethodTrainer(tiny_model(), trainer.config, next_batch, replace(SETTINGS["diffcr"], ratio_weight=9.0))
    with pytest.raises(ValueError, match="DiffCR.ratio_weight 3.0 \\(now 9.0\\)"):
        other.run(tmp_path, resume=True)


def worker(rank: int, world: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    found = {}
    for name in TRAINED:
        trainer = make_trainer(name)
        trainer.run()
        found[name] = {"weights": trainer.weights.state_dict(), "history": losses(trainer)}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_losses_of_one(tmp_path):
    """Each has micro-batches of its own region, and may use weights that the other does not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        wanted = {name: make_trainer(name) for name in TRAINED}
        for trainer in wanted.values():
            trainer.run()
    finally:
        torch.set_num_threads(threads)
    run_two(worker, 2, free_port(), str(tmp_path))
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, trainer in wanted.items():
        for result in results:
            for got, entry in zip(result[name]["history"], losses(trainer), strict=True):
                assert all(abs(got[key] - entry[key]) <= 2e-5 for key in entry if key != "stage"), (name, got, entry)
        for key, value in results[0][name]["weights"].items():
            assert torch.equal(value, results[1][name]["weights"][key]), (name, key)


@pytest.mark.parametrize("name", TRAINED)
def test_the_transformer_is_left_as_it_was_found(name):
    trainer = make_trainer(name)
    batch = next_batch(2, torch.Generator().manual_seed(1))
    inputs = dict(hidden_states=batch.latents, timestep=torch.full((2,), 500.0), **batch.conditions, return_dict=False)
    fresh = two_heads() if name == "dydit" else tiny_model()
    trainer.run()
    trainer.close()
    with torch.no_grad():
        assert torch.equal(trainer.transformer(**inputs)[0], fresh(**inputs)[0])


@pytest.mark.parametrize(("name", "settings"), [("diffcr", DiffCR(regions=4)), ("sparsedit", SparseDiT(regions=8))])
def test_the_samples_of_a_call_come_from_one_region(name, settings):
    trainer = MethodTrainer(
        tiny_model() if name == "diffcr" else _deep(), replace(CONFIG, method=name), next_batch, settings
    )
    for seed in range(20):
        drawn = trainer.draw(torch.Generator().manual_seed(seed))
        regions = [{int(level * settings.regions) for level in sigma.tolist()} for (sigma,) in drawn]
        assert all(len(each) == 1 for each in regions) and len({min(each) for each in regions}) == len(regions)
    trainer.close()


def _deep():
    config = {k: v for k, v in dict(tiny_model().config).items() if not k.startswith("_")} | dict(num_layers=5)
    return type(tiny_model())(**config).eval()


def test_diffcr_ratios_fall_to_the_budget():
    """With nothing but its own term to weigh, the mean ratio reaches the budget."""
    config = dict(diffusion_weight=0.0, output_weight=0.0, feature_weight=0.0, lr_policy=0.05, warmup=0)
    trainer = make_trainer("diffcr", **config)
    trainer.run_stage("joint", 40)
    assert trainer.weights.keep.mean().item() == pytest.approx(0.5, abs=0.05)


def test_dydit_operations_fall_to_their_share():
    config = dict(diffusion_weight=0.0, output_weight=0.0, feature_weight=0.0, lr_router=0.1, warmup=0)
    trainer = make_trainer("dydit", **config)
    trainer.method = replace(SETTINGS["dydit"], complete=0.0, flops_weight=50.0)
    trainer.run_stage("joint", 60)
    generator = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(10):
        trainer.loss("joint", trainer.draw(generator)[0], generator)
        dynamic, static = (sum(each[i] for each in trainer.state.scratch["flops"].values()) for i in (0, 1))
        shares.append((dynamic / static).mean().item())
    assert sum(shares) / 10 == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("name", ["dit", "pixart"])
@pytest.mark.parametrize("method", ["diffcr", "dydit"])
def test_other_families_train(name, method):
    build, scheduler, shape, conditions = CASES[name]

    def batch(count, generator):
        def draw(*sizes):
            return torch.randn(sizes, generator=generator)

        return Batch(draw(count, *shape), conditions(draw, count))

    config = TrainConfig(
        method=method, joint_steps=2, batch_size=4, micro_batches=2, adapter_rank=2, precision="fp32", budget=0.5
    )
    if (name, method) == ("pixart", "dydit"):  # its tiny model has one head
        build = partial(build_pixart, num_attention_heads=2, cross_attention_dim=128)
    trainer = MethodTrainer(build(), config, batch, objective=objective_for(scheduler()))
    trainer.run()
    assert trainer.history[-1]["diffusion"] > 0
    trainer.close()


def test_refusals():
    with pytest.raises(ValueError, match="wanted one of diffcr, dydit, sparsedit"):
        MethodTrainer(tiny_model(), replace(CONFIG, method="shiva"), next_batch)
    with pytest.raises(ValueError, match="start_from"):
        MethodTrainer(tiny_model(), replace(CONFIG, method="diffcr", start_from="x"), next_batch)
    with pytest.raises(ValueError, match="wanted at least 5"):
        MethodTrainer(tiny_model(), replace(CONFIG, method="sparsedit"), next_batch)
    with pytest.raises(ValueError, match="at least 2 heads"):
        MethodTrainer(tiny_model(), replace(CONFIG, method="dydit"), next_batch)
