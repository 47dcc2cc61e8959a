"""Two processes do what one does with the same global batch."""

import os

import pytest
import torch
import torch.distributed as dist
from processes import free_port, run_two

from .runs import everything, losses, make_trainer


def worker(rank: int, world: int, port: int, folder: str, changes: dict) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    trainer = make_trainer(**changes)
    trainer.run(os.path.join(folder, "checkpoints"))
    torch.save({"learned": everything(trainer), "history": losses(trainer)}, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def train_on_two(folder, **changes) -> list[dict]:
    run_two(worker, 2, free_port(), str(folder), changes)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_processes_give_the_losses_and_the_budget_of_one(tmp_path, sharding):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes: the last bits of a sum depend on it
    try:
        trainer = make_trainer(sharding="ddp")
        trainer.run()
    finally:
        torch.set_num_threads(threads)
    wanted, history = everything(trainer), losses(trainer)
    results = train_on_two(tmp_path, sharding=sharding)
    for result in results:
        assert [{k: e[k] for k in ("stage", "step")} for e in result["history"]] == [
            {k: e[k] for k in ("stage", "step")} for e in history
        ]
        for got, entry in zip(result["history"], history, strict=True):
            assert all(abs(got[name] - entry[name]) <= 2e-5 for name in entry if name != "stage"), (got, entry)
        torch.testing.assert_close(result["learned"]["mu"], wanted["mu"], rtol=0, atol=1e-5)
        assert result["learned"].keys() == wanted.keys()
        if sharding == "ddp":  # sharded weights lie elsewhere and round otherwise, and Adam divides by small gradients
            for name, value in wanted.items():
                torch.testing.assert_close(result["learned"][name], value, rtol=1e-3, atol=1e-3, msg=name)
    for name, value in results[0]["learned"].items():  # and both processes hold the same, bit for bit
        assert torch.equal(value, results[1]["learned"][name]), name


def test_micro_batches_must_be_shared_out_evenly(monkeypatch):
    from shiva_ext.training import loop

    monkeypatch.setattr(loop, "world", lambda: 3)
    with pytest.raises(ValueError, match="micro_batches is 4, wanted a multiple of the 3 processes"):
        make_trainer()


def test_sharding_wants_processes():
    with pytest.raises(ValueError, match="sharding='fsdp' wants several processes"):
        make_trainer(sharding="fsdp")
