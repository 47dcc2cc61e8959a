"""soft_rank holds O(N) memory, forward and backward."""

import subprocess
import sys

import pytest

MEASURE = """
import torch
from shiva_ext import ops

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))

def forward_backward(scores):
    return torch.autograd.grad(ops.soft_rank(scores, 0.1), scores, torch.ones(scores.shape))[0]

torch.set_num_threads(2)
forward_backward(torch.randn(1, 257, requires_grad=True))
scores = torch.randn(1, 32768, requires_grad=True)
with open("/proc/self/clear_refs", "w") as clear:
    clear.write("5")  # the peak starts again from what is resident now
before = status("VmRSS")
forward_backward(scores)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory from Linux's /proc")
def test_soft_rank_of_32768_tokens_peaks_under_64_mib_above_its_inputs():
    result = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) / 1024 < 64
