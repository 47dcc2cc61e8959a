"""How much of a run's time the package's own ops take."""

import time
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

PREFIX = "shiva::"


def share_of_ops(run: Callable[[], object]) -> dict[str, float]:
    """Share of the time of ``run()`` spent in each op of this library: {"topk_select": 0.001, ...}, largest first.

    It is the time of the CPU, so on a GPU the share of the launches, not of the kernels.

    Args:
        run: calls the enabled model or pipeline; it is called once, under torch's profiler.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        started = time.perf_counter()
        run()
        total = time.perf_counter() - started
    shares = {
        event.key.removeprefix(PREFIX): event.cpu_time_total / 1e6 / total
        for event in profiler.key_averages()
        if event.key.startswith(PREFIX)
    }
    return dict(sorted(shares.items(), key=lambda item: -item[1]))
