"""Where the tests begin: the long ones first, so that several workers end at about the same time."""

import pytest
import torch

LONG = (
    "test_simulated.py",
    "test_compile.py",
    "test_processes.py",
    "test_fit.py",
    "test_resume.py",
    "test_export.py",
    "test_families.py",
    "test_registration.py",
    "test_simt.py",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture
def one_thread():
    """Most tensors here are tiny: a second thread would only be waited for. Tests of threading set their own number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """The first testbed's model with two layers, untrained."""
    from shiva_ext.testbed.model import PromptTable, build_transformer, save_model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, build_transformer(num_layers=2), PromptTable())
    return folder
