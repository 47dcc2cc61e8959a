"""Experts shared out among two processes do what one process does with the whole batch."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from processes import free_port, run_two
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from shiva_ext import moe
from shiva_ext.moe import MoEConfig, SparseMoE, record_routing

D, STEPS = 16, 3


def make_model() -> nn.Module:
    torch.manual_seed(0)
    config = MoEConfig(num_experts=4, expert_width=24, shared_width=8, bias=True, balance_weight=0.1)
    model = nn.Sequential(nn.Linear(D, D), SparseMoE(D, config), nn.Linear(D, D), SparseMoE(D, config))
    with torch.no_grad():
        for layer in (model[1], model[3]):
            layer.router.weight.normal_()
    return model


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(STEPS, 6, 5, D, generator=generator), torch.randn(STEPS, 6, 5, D, generator=generator)


def train(model: nn.Module, inner: nn.Module, rank: int, world: int) -> list[list[float]]:
    """STEPS of SGD with clipped gradients, each on this process' part of the batch; losses, balances and norms."""
    optimizer, losses = torch.optim.SGD(inner.parameters(), lr=0.1), []
    for x, y in zip(*data(), strict=True):
        x, y = x.chunk(world)[rank], y.chunk(world)[rank]
        with record_routing(inner) as routing:
            loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        (loss + routing.balance_loss()).backward()
        norm = moe.clip_grad_norm_(inner, 0.02)
        optimizer.step()
        losses.append([loss.item(), routing.balance_loss().item(), norm.item()])
    return losses


class _Caller(nn.Module):
    def __init__(self, modules: nn.ModuleDict):
        super().__init__()
        self.inside = modules

    def forward(self, x):
        return self.inside["model"](x)


def worker(rank: int, world: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    model = make_model()
    moe.shard_experts(model)
    held = [len(model[i].experts.experts.w_in) for i in (1, 3)]
    try:
        moe.shard_experts(model)
        refused = ""
    except ValueError as error:
        refused = str(error)
    copied = copy.deepcopy(model)
    count = moe.count_parameters(model)
    wrong = nn.Sequential(make_model())
    moe.shard_experts(wrong)
    try:
        DistributedDataParallel(wrong)(torch.zeros(1, 2, D))
        overwritten = ""
    except RuntimeError as error:
        overwritten = str(error)
    # Inside another module, and frozen at first.
    outer = nn.ModuleDict({"model": model})
    model[1].experts.requires_grad_(False)
    model[1].experts.requires_grad_(True)
    wrapped = moe.data_parallel(_Caller(outer))
    losses = train(wrapped, model, rank, world)
    same = all(torch.equal(a, b) for a, b in zip(copied.parameters(), model.parameters(), strict=True))
    try:
        moe.save(model, folder)
        unsaved = ""
    except ValueError as error:
        unsaved = str(error)
    moe.gather_experts(model)
    result = dict(losses=losses, held=held, refused=refused, unsaved=unsaved, state=model.state_dict())
    result |= dict(overwritten=overwritten, moved=not same, count=count)
    torch.save(result, os.path.join(folder, f"{rank}.pt"))
    del wrapped  # see data_parallel
    dist.destroy_process_group()


def test_two_processes_train_as_one(tmp_path):
    model = make_model()
    wanted = train(model, model, 0, 1)
    run_two(worker, 2, free_port(), str(tmp_path))
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for result in results:
        assert result["held"] == [2, 2]
        assert "shared out already" in result["refused"] and "gather_experts" in result["unsaved"]
        assert result["moved"] and result["count"] == moe.count_parameters(model)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(result["state"][name], value, rtol=1e-5, atol=1e-5, msg=name)
    assert all("has copied one process' experts" in result["overwritten"] for result in results)
    for step, (loss, balance, norm) in enumerate(wanted):
        halves = [result["losses"][step] for result in results]
        assert sum(half[0] for half in halves) / 2 == pytest.approx(loss, abs=1e-5)
        assert all(half[1] == pytest.approx(balance, abs=1e-5) for half in halves)
        assert all(half[2] == pytest.approx(norm, rel=1e-4) for half in halves) and norm > 0.02


def test_sharing_without_processes_is_refused():
    with pytest.raises(RuntimeError, match="init_process_group first"):
        moe.shard_experts(make_model())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (MoEConfig(num_experts=3), "layer has 3 experts, which 2 processes cannot share evenly"),
        (MoEConfig(capacity_factor=1.0), r"capacity_factor=1\.0; shard_experts needs None"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(config, said):
    with pytest.raises(ValueError, match=said):
        moe.parallel.check_shardable("layer", SparseMoE(D, config), 2)
    with pytest.raises(ValueError, match="are not shared out"):
        moe.gather_experts(SparseMoE(D, config))
