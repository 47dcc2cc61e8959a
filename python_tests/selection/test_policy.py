"""RatioPolicy against eq. 10, 11 and 29; BudgetLoss against eq. 12 and 13."""

import json
import math
from dataclasses import asdict

import pytest
import torch
import torch.distributed as dist
from processes import run_two

from shiva_ext.selection import BudgetLoss, PolicyConfig, RatioPolicy

SIGMA = torch.tensor([0.0, 0.25, 0.7, 1.0])


def trained(**options):
    """A policy that is no longer at its initial value."""
    torch.manual_seed(0)
    policy = RatioPolicy(**{"num_layers": 5, "target": 0.6, **options})
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return policy


@pytest.mark.parametrize("target", [0.01, 0.5, 0.6, 0.95])
def test_every_ratio_starts_at_the_target(target):
    ratios = RatioPolicy(num_layers=5, target=target)(SIGMA)
    torch.testing.assert_close(ratios[:, 1:], torch.full((4, 4), target), rtol=1e-6, atol=0)
    assert (ratios[:, 0] == 1).all()


def test_a_ratio_is_the_sigmoid_of_a_time_logit_plus_a_layer_logit_plus_the_anchor():
    policy = trained(hidden=8)
    ratios = policy(SIGMA)
    for row, sigma in enumerate(SIGMA.tolist()):
        angles = torch.tensor([1000 * sigma * math.exp(-math.log(10000) * i / 3) for i in range(4)])
        sinusoid = torch.cat([angles.cos(), angles.sin()])
        for layer in range(1, 5):
            time, depth = (
                branch[2].weight @ torch.nn.functional.silu(branch[0](value))
                for branch, value in ((policy.time, sinusoid), (policy.layer, policy.layer_embedding[layer - 1]))
            )
            wanted = 1 / (1 + torch.exp(-(time + depth + policy.anchor)))
            torch.testing.assert_close(ratios[row, layer], wanted[0], rtol=1e-4, atol=1e-4)


def test_the_trend_over_time_is_the_same_at_every_depth():
    logits = torch.logit(trained()(SIGMA)[:, 1:])
    difference = logits - logits[:1]
    torch.testing.assert_close(difference, difference[:, :1].expand_as(difference), rtol=1e-3, atol=1e-4)


def test_all_parameters_learn_after_the_first_step():
    policy = trained()
    (policy(SIGMA) * torch.randn(4, 5)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.parameters())


def test_noise_has_unit_scale_on_the_logits_and_spares_the_dense_layers():
    policy = RatioPolicy(num_layers=5, target=0.6)
    generator = torch.Generator().manual_seed(0)
    ratios = policy(torch.rand(2000), noise=1.0, generator=generator)
    assert (ratios[:, 0] == 1).all()
    noise = torch.logit(ratios[:, 1:].detach()) - policy.anchor.detach()
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    again = policy(torch.rand(2000), noise=1.0, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again, ratios)


def test_autocast_does_not_coarsen_the_ratios():
    policy = trained()
    with torch.autocast("cpu", torch.bfloat16):
        ratios = policy(SIGMA)
    assert ratios.dtype == torch.float32 and torch.equal(ratios, policy(SIGMA))


def test_the_configuration_survives_json():
    policy = trained(hidden=16, first_layer=2)
    copy = RatioPolicy.from_config(PolicyConfig(**json.loads(json.dumps(asdict(policy.config)))))
    copy.load_state_dict(policy.state_dict())
    assert torch.equal(copy(SIGMA), policy(SIGMA))


@pytest.mark.parametrize("target", [0.0, 1.0, -1.0, 1.5, math.nan])
def test_a_target_without_a_logit_is_an_error(target):
    with pytest.raises(ValueError, match="target is"):
        RatioPolicy(num_layers=5, target=target)


def test_bad_layers_and_shapes_are_errors():
    with pytest.raises(ValueError, match="first_layer is 5"):
        RatioPolicy(num_layers=5, target=0.5, first_layer=5)
    with pytest.raises(ValueError, match="sigma has shape"):
        RatioPolicy(num_layers=5, target=0.5)(torch.tensor(0.5))
    with pytest.raises(ValueError, match="never pruned"):
        BudgetLoss(0.5)(torch.ones(4, 1))
    with pytest.raises(ValueError, match="beta"):
        BudgetLoss(0.5, beta=0)
    with pytest.raises(ValueError, match="target"):
        BudgetLoss(0.0)


def test_the_budget_loss_is_equations_12_and_13():
    torch.manual_seed(0)
    loss, mu = BudgetLoss(0.6, weight=0.7, beta=0.2), 0.6
    for _ in range(5):
        ratios = torch.rand(3, 4, requires_grad=True)
        value = loss(ratios)
        mean = sum(ratios[i, j].item() for i in range(3) for j in range(1, 4)) / 9
        mu = 0.2 * mean + 0.8 * mu
        assert value.item() == pytest.approx(0.7 * mean * 2 * (mu - 0.6), rel=1e-4, abs=1e-7)
        value.backward()
        assert (ratios.grad[:, 0] == 0).all()  # the layer that is never pruned
        wanted = torch.full((3, 3), 0.7 * 2 * (mu - 0.6) / 9)  # mu itself has no gradient
        torch.testing.assert_close(ratios.grad[:, 1:], wanted, rtol=1e-4, atol=1e-7)


def test_the_average_does_not_move_in_eval_mode():
    loss = BudgetLoss(0.6).eval()
    loss(torch.ones(2, 3))
    assert loss.mu.item() == pytest.approx(0.6)


def test_the_average_is_saved_with_the_state_dict():
    loss = BudgetLoss(0.6)
    loss(torch.ones(2, 3))
    copy = BudgetLoss(0.6)
    copy.load_state_dict(loss.state_dict())
    assert copy.mu.item() == loss.mu.item() != pytest.approx(0.6)


def test_the_budget_loss_drives_a_policy_to_its_target():
    policy, loss = RatioPolicy(num_layers=4, target=0.9, hidden=16), BudgetLoss(0.5)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        loss(policy(torch.rand(8))).backward()
        optimizer.step()
    assert policy(SIGMA)[:, 1:].mean().item() == pytest.approx(0.5, abs=0.05)


def _one_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    loss = BudgetLoss(0.6)
    loss(torch.full((2, 3), 0.4 if rank == 0 else 1.0))
    assert loss.mu.item() == pytest.approx(0.2 * 0.7 + 0.8 * 0.6)
    dist.destroy_process_group()


def test_the_average_is_taken_over_all_ranks(tmp_path):
    run_two(_one_rank, tmp_path)
