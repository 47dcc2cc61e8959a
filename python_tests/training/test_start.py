"""Going on from an artefact."""

import json

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from shiva_ext import adapter_weights, load

from .runs import make_trainer

ALONE = dict(router_steps=0, policy_steps=0, joint_steps=1)


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    trainer = make_trainer(router_steps=1, policy_steps=1, joint_steps=2)
    trainer.run()
    trainer.export(folder)
    return folder


def test_it_begins_with_what_the_artefact_holds(artefact):
    start = load(artefact)
    trainer = make_trainer(start_from=str(artefact), **ALONE)
    for name in ("router", "policy"):
        mine, theirs = (getattr(each, name).state_dict() for each in (trainer, start))
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs) and mine.keys() == theirs.keys()
    trainer.add_adapters()
    mine = get_peft_model_state_dict(trainer.transformer, adapter_name=adapter_weights.NAME)
    theirs = load_file(artefact / "adapter" / "adapter_model.safetensors")
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k].float()) for k in theirs)


def test_it_trains_on_and_says_where_it_came_from(artefact, tmp_path):
    trainer = make_trainer(start_from=str(artefact), **ALONE)
    trainer.run(tmp_path / "checkpoints")
    trainer.export(tmp_path / "out")
    metadata = json.loads((tmp_path / "out" / "config.json").read_text())["metadata"]
    assert metadata["started_from"] == json.loads((artefact / "config.json").read_text())["metadata"]
    assert metadata["training"]["start_from"] == str(artefact)
    assert [entry["stage"] for entry in metadata["history"]] == ["joint"]
    before, after = load(artefact).router.state_dict(), load(tmp_path / "out").router.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(hidden=8), "router.hidden 64 .the run's is 8"),
        (dict(share=1), "router.share 2"),
        (dict(adapter_rank=3), "adapter_rank 2 .the run's is 3"),
    ],
)
def test_another_kind_is_refused_with_what_differs(artefact, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(start_from=str(artefact), **ALONE, **changes)


def test_another_family_and_a_missing_folder_are_refused(artefact, tmp_path):
    (tmp_path / "shiva.safetensors").write_bytes((artefact / "shiva.safetensors").read_bytes())
    config = json.loads((artefact / "config.json").read_text())
    config |= {"model_class": "FluxTransformer2DModel", "adapter": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="model class FluxTransformer2DModel"):
        make_trainer(start_from=str(tmp_path), **ALONE)
    with pytest.raises(FileNotFoundError):
        make_trainer(start_from=str(tmp_path / "none"), **ALONE)
