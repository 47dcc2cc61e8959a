"""Two processes for a test, which fails if they hang."""

import socket
import time

import pytest
import torch.multiprocessing as mp

LIMIT = 600  # seconds; two cores under load need up to a tenth of it


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_two(worker, *arguments) -> None:
    """``worker(rank, *arguments)`` in two new processes; raises what either raises, and kills them after LIMIT."""
    context = mp.start_processes(worker, arguments, nprocs=2, join=False, start_method="spawn")
    deadline = time.monotonic() + LIMIT
    try:
        while not context.join(timeout=5):
            if time.monotonic() > deadline:
                pytest.fail(f"two processes of {worker.__name__} did not end within {LIMIT} s")
    finally:
        for process in context.processes:
            process.kill()
