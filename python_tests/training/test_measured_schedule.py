"""Training with a measured schedule: what is measured, when, and that it survives stops and processes."""

from dataclasses import replace

import pytest
import torch

import shiva_ext
from shiva_ext.selection import RatioTable
from shiva_ext.training.measure import ratio_values
from shiva_ext.training.sampling import derive_seed
from shiva_ext.training.trainer import ShivaTrainer

from .runs import CONFIG, everything, losses, make_trainer, next_batch, tiny_model
from .test_processes import train_on_two

MEASURED = dict(schedule="measured", schedule_updates=2, schedule_samples=2, table_levels=4)


def test_values_are_central_differences_that_end_at_the_bounds():
    asked = []

    def loss(ratios):
        asked.append(ratios.tolist())
        return float(ratios.double() ** 2 @ torch.tensor([5.0, -1.0, -2.0, -3.0], dtype=torch.float64))

    ratios = torch.tensor([1.0, 0.5, 0.95, 0.05])
    values = ratio_values(loss, ratios, 1, delta=0.1)
    # The difference of a square over an interval is its middle, twice.
    torch.testing.assert_close(
        values, torch.tensor([0.0, 1.0, 2 * 1.85, 3 * 0.175], dtype=torch.float64), rtol=1e-5, atol=0
    )
    assert len(asked) == 6 and all(each[0] == 1.0 for each in asked)
    assert all(sum(a != b for a, b in zip(each, ratios.tolist(), strict=True)) == 1 for each in asked)


def test_a_value_is_the_difference_of_the_distances_of_two_pruned_outputs():
    trainer = make_trainer(**MEASURED)
    values, level, layer = trainer.ratio_values(step=0), 2, 1
    seed = derive_seed(trainer.config.seed, "schedule", 0, level, 0)
    sigma = torch.full((2,), (level + 1) / 4)
    call = trainer.call(sigma, torch.Generator().manual_seed(seed))
    trainer.close()
    with torch.no_grad():
        dense = trainer.transformer(**call.inputs, return_dict=False)[0]
        distances = []
        for kept in (0.6 - 0.125, 0.6 + 0.125):
            ratios = torch.tensor([[1.0, 0.6, 0.6]])
            ratios[0, layer] = kept
            artifact = replace(trainer.artifact, table=RatioTable([0.5], ratios))
            with shiva_ext.enable(trainer.transformer, artifact, batched_guidance=False, tile=1):
                output = trainer.transformer(**call.inputs, return_dict=False)[0]
            distances.append((output - dense).square().mean().item())
    assert values[level, layer].item() == pytest.approx((distances[0] - distances[1]) / 0.25, rel=1e-3, abs=1e-7)


def test_measuring_repeats_and_leaves_no_trace():
    trainer = make_trainer(**MEASURED)
    trainer.run_stage("router", 1)
    before = everything(trainer)
    values = trainer.ratio_values(step=0)
    assert values.shape == (4, 3) and (values[:, 0] == 0).all() and torch.isfinite(values).all() and values.any()
    assert torch.equal(values, trainer.ratio_values(step=0)) and not torch.equal(values, trainer.ratio_values(step=1))
    after = everything(trainer)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert trainer.estimator.noise_fraction == 0.1 and all(p.grad is None for p in trainer.router.parameters())


def test_the_schedule_moves_to_where_the_loss_falls(monkeypatch):
    trainer = make_trainer(**MEASURED, joint_steps=8)
    asked = []

    def values(self, step):
        asked.append(step)
        return torch.tensor([[0.0, 1.0, 8.0]] * 4, dtype=torch.float64)

    monkeypatch.setattr(ShivaTrainer, "ratio_values", values)
    trainer.run()
    assert asked == [1, 4]  # 3/8 of a half, and of three halves, of 8 steps
    ratios = trainer.schedule.ratios
    assert (ratios[:, 0] == 1).all() and (ratios[:, 2] > ratios[:, 1]).all()
    assert ratios[:, 1:].mean().item() == pytest.approx(0.6, abs=1e-6)
    assert {entry["stage"] for entry in trainer.history} == {"router", "joint"}


@pytest.mark.parametrize(
    ("changes", "wanted"), [({}, 4), (dict(regions=16), 16), (MEASURED, 10), (MEASURED | dict(regions=2), 2)]
)
def test_micro_batches_draw_from_as_many_regions_as_was_asked_for(changes, wanted):
    trainer = make_trainer(**changes)
    assert trainer.regions == wanted
    for seed in range(5):
        for levels, _ in trainer.draw(torch.Generator().manual_seed(seed)):
            assert (levels * wanted).long().unique().numel() == 1


def test_the_budget_is_seen_at_all_levels_where_a_step_draws_from_a_few(monkeypatch):
    trainer, seen = make_trainer(regions=16), []
    monkeypatch.setattr(trainer, "budget_loss", lambda ratios: seen.append(ratios) or ratios.sum() * 0)
    trainer.once_a_step("joint", torch.full((8,), 0.97))
    wanted = trainer.policy((torch.arange(8) + 0.5) / 8)
    assert torch.equal(seen[0], wanted)


def test_what_is_exported_has_the_schedule_and_no_policy(tmp_path):
    trainer = make_trainer(**MEASURED)
    trainer.run(tmp_path / "checkpoints")
    trainer.export(tmp_path / "out")
    artifact = shiva_ext.load(tmp_path / "out")
    assert artifact.policy is None and artifact.table.mean() == pytest.approx(0.6, abs=1 / 16)
    assert all("budget_error" not in entry for entry in trainer.history)
    wanted = trainer.schedule(torch.tensor(artifact.table.sigmas))
    assert (artifact.table.ratios_tensor - wanted).abs().max() <= 1.5 / 16  # rounded to tokens
    with pytest.raises(AttributeError, match="without a policy"):
        _ = trainer.policy
    trainer.close()
    with shiva_ext.enable(trainer.transformer, tmp_path / "out", batched_guidance=False) as handle:
        assert handle.state.selector.table == artifact.table


class Stop(BaseException):
    pass


@pytest.mark.parametrize("after", [3, 5, 6])
def test_a_stopped_run_ends_as_one_that_was_not(after, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        options = MEASURED | dict(checkpoint_every=1)
        whole = make_trainer(**options)
        whole.run()

        def stopping(trainer, done):
            if done == after:
                raise Stop

        trainer = make_trainer(**options)
        trainer.after_step = stopping
        with pytest.raises(Stop):
            trainer.run(tmp_path)
        trainer = make_trainer(**options)
        trainer.run(tmp_path, resume=True)
    finally:
        torch.set_num_threads(threads)
    wanted, got = everything(whole), everything(trainer)
    assert got.keys() == wanted.keys() and [k for k in wanted if not torch.equal(got[k], wanted[k])] == []
    assert losses(trainer) == losses(whole)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_processes_share_the_levels_and_hold_the_same_schedule(tmp_path, sharding):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = make_trainer(**MEASURED | dict(table_levels=3))  # which two do not divide
        alone.run()
    finally:
        torch.set_num_threads(threads)
    results = train_on_two(tmp_path, **MEASURED | dict(table_levels=3), sharding=sharding)
    one, two = (result["learned"]["schedule.ratios"] for result in results)
    assert torch.equal(one, two)
    torch.testing.assert_close(one, everything(alone)["schedule.ratios"], rtol=0, atol=0.02)


def test_it_goes_on_from_an_artefact_of_either_kind(tmp_path):
    learned, measured = make_trainer(), make_trainer(**MEASURED)
    for name, trainer in (("learned", learned), ("measured", measured)):
        trainer.run()
        trainer.export(tmp_path / name)
        trainer.close()
    for name in ("learned", "measured"):
        trainer = make_trainer(**MEASURED, start_from=str(tmp_path / name), router_steps=0, joint_steps=2)
        table = shiva_ext.load(tmp_path / name).table
        wanted = table.at_levels(trainer.schedule.sigmas).ratios_tensor
        assert (trainer.schedule.ratios - wanted).abs().max() <= 1.5 / 16
        trainer.run()
    with pytest.raises(ValueError, match="cannot start from"):
        make_trainer(start_from=str(tmp_path / "measured"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(schedule="magic"), "schedule is 'magic', wanted one of 'policy', 'measured'"),
        (dict(schedule_updates=0), "schedule_updates is 0"),
        (dict(schedule_samples=0), "schedule_samples 0"),
        (dict(schedule="measured", budget=0.1), "wanted at least 0.2 for a measured schedule"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(next_batch, **changes)


def test_the_control_measures_nothing():
    trainer = ShivaTrainer(tiny_model(), replace(CONFIG, **MEASURED), next_batch, dense=True)
    trainer.run()
    assert trainer.stages == ("joint",) and not trainer.measured
