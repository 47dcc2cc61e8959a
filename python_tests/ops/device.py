"""Where the tensors of these tests are: on the CPU, or on the device that SHIVA_TEST_DEVICE names.

What the ops give is compared on the CPU, with a reference that has never been anywhere else.
"""

import os
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")
DEVICE = torch.device(os.environ.get("SHIVA_TEST_DEVICE") or "cpu")


def place(t: Tensor, device: torch.device = DEVICE) -> Tensor:
    """A CPU tensor on a device, with its strides, its offset and the elements that lie between its own."""
    if device.type == "cpu":
        return t
    whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).to(device)
    return whole.as_strided(t.shape, t.stride(), t.storage_offset())


def host(value: Any) -> Any:
    """A tensor on the CPU; anything else as it is."""
    return value.cpu() if torch.is_tensor(value) else value


def report() -> str:
    """How much was allocated there, so that nobody takes a run on the CPU for one of the device."""
    count = torch.cuda.memory_stats().get("allocation.all.allocated", 0) if DEVICE.type == "cuda" else 0
    return f"device under test ({DEVICE.type}): {count} allocations"
