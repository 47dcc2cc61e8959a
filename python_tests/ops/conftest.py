import pytest

from . import device, simulated  # the latter replaces the kernels if the environment says so


@pytest.fixture(autouse=True)
def always_one_thread(one_thread):
    pass


def pytest_terminal_summary(terminalreporter):
    if simulated.VARIANT:
        terminalreporter.write_line(simulated.report())
    if device.DEVICE.type != "cpu":
        terminalreporter.write_line(device.report())
