import pytest

from .tiny import make_artifact, make_inputs, make_model, make_pipeline


@pytest.fixture(autouse=True)
def always_one_thread(one_thread):
    pass


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
