"""A run's memory: kept within a run, gone with the next."""

import pytest
import torch

from shiva_ext.methods.memory import RunMemory

X = torch.zeros(2, 3, 4, 4)


def after(*sigmas, x=X):
    memory = RunMemory()
    for sigma in sigmas:
        memory.begin(sigma, x)
        memory.set("seen", value=(memory.get("seen") or 0) + 1)
    return memory


def test_falling_levels_are_one_run():
    memory = after(1.0, 0.6, 0.2)
    assert memory.step == 2 and memory.get("seen") == 3


def test_two_calls_at_one_level_are_two_branches():
    memory = after(1.0, 1.0, 0.6, 0.6)
    assert memory.step == 1 and memory.get("seen") == 2
    memory.begin(0.2, X)
    memory.set("seen", value="first")
    memory.begin(0.2, X)
    assert memory.get("seen") == 2  # of the second call's own


def test_a_third_call_at_one_level_and_a_higher_level_begin_anew():
    assert after(1.0, 1.0, 1.0).get("seen") == 1
    memory = after(1.0, 0.5, 1.0)
    assert memory.step == 0 and memory.get("seen") == 1


@pytest.mark.parametrize("other", [X[:1], X.double(), torch.zeros(2, 3, 4, 8)])
def test_another_batch_dtype_or_size_has_a_memory_of_its_own(other):
    memory = after(1.0, 0.5)
    memory.begin(0.5, other)
    assert memory.get("seen") is None
    memory.set("seen", value="other")
    memory.begin(0.2, X)
    assert memory.get("seen") == 2 and memory.step == 2  # calls in between, as of skip-layer guidance, do no harm
    memory.begin(0.2, other)
    assert memory.get("seen") == "other"
    memory.begin(1.0, X)
    memory.begin(1.0, other)
    assert memory.get("seen") is None and memory.step == 0


def test_a_solver_may_evaluate_a_level_twice():
    memory = RunMemory()
    for sigma in (1.0, 0.6, 0.6, 0.2, 0.2):
        memory.begin(sigma, X, repeated=True)
        memory.set("seen", value=(memory.get("seen") or 0) + 1)
    assert memory.get("seen") == 5 and memory.step == 2


def test_it_tells_how_much_it_holds():
    memory = after(1.0)
    memory.set("t", value=torch.zeros(10, dtype=torch.bfloat16))
    assert memory.bytes == 20
    memory.set("pair", value=(3, torch.zeros(2, dtype=torch.float32)))
    assert memory.bytes == 28
    memory.reset()
    assert memory.bytes == 0
