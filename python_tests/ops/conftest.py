import pytest
import torch

from . import device, simulated  # the latter replaces the kernels if the environment says so


@pytest.fixture(autouse=True)
def one_thread():
    """Most tensors here are tiny: a second thread would only be waited for. Tests of threading set their own number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter):
    if simulated.VARIANT:
        terminalreporter.write_line(simulated.report())
    if device.DEVICE.type != "cpu":
        terminalreporter.write_line(device.report())
