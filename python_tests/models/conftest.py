import pytest
import torch

from .tiny import make_artifact, make_inputs, make_model, make_pipeline


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors here are tiny: a second thread would only be waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def inputs():
    return make_inputs()


@pytest.fixture
def artifact():
    return make_artifact()


@pytest.fixture
def pipe(model):
    return make_pipeline(model)
