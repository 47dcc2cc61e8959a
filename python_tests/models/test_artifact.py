"""Artefacts on disk: bit-exact round trips, and clear errors for anything else."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import shiva_ext
from shiva_ext.selection import RatioPolicy, RatioTable

from .tiny import LAYERS, assert_unchanged, make_artifact, make_inputs, make_model, snapshot, varying_table

METADATA = {"training": {"steps": 12, "lr": 3e-4}, "note": "é", "list": [1, None, True]}


def make_policy():
    torch.manual_seed(8)
    policy = RatioPolicy(LAYERS, 0.6, hidden=8)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return policy


def write(folder, **options):
    return shiva_ext.save(make_artifact(varying_table(), metadata=METADATA, **options), folder)


@pytest.mark.parametrize("with_policy", [False, True])
def test_a_round_trip_is_bit_exact(tmp_path, with_policy):
    saved = make_artifact(varying_table(), metadata=METADATA, policy=make_policy() if with_policy else None)
    loaded = shiva_ext.load(shiva_ext.save(saved, tmp_path / "new" / "artefact"))
    assert loaded.model_class == saved.model_class and loaded.metadata == METADATA and loaded.adapter is None
    assert loaded.table == saved.table and loaded.router.config == saved.router.config
    pairs = [(loaded.router, saved.router)] + [(loaded.policy, saved.policy)] * with_policy
    for got, wanted in pairs:
        assert list(got.state_dict()) == list(wanted.state_dict())
        for key, value in wanted.state_dict().items():
            assert torch.equal(got.state_dict()[key], value)
        assert not got.training and not any(p.requires_grad for p in got.parameters())
    if with_policy:
        sigma = torch.linspace(0, 1, 5)
        assert loaded.policy.config == saved.policy.config
        assert torch.equal(loaded.policy(sigma), saved.policy(sigma))
    else:
        assert loaded.policy is None


def test_the_folder_the_path_and_the_artefact_are_the_same_source(tmp_path, inputs):
    write(tmp_path)
    outputs = []
    for source in (str(tmp_path), tmp_path, shiva_ext.load(tmp_path), make_artifact(varying_table())):
        model = make_model()
        with torch.no_grad(), shiva_ext.enable(model, source):
            outputs.append(model(**inputs)[0])
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_a_bfloat16_router_stays_one(tmp_path):
    saved = make_artifact()
    saved.router.bfloat16()
    loaded = shiva_ext.load(shiva_ext.save(saved, tmp_path))
    for key, value in saved.router.state_dict().items():
        assert loaded.router.state_dict()[key].dtype == torch.bfloat16
        assert torch.equal(loaded.router.state_dict()[key], value)


def test_loading_draws_no_random_numbers(tmp_path):
    write(tmp_path, policy=make_policy())
    torch.manual_seed(0)
    wanted = torch.randn(3)
    torch.manual_seed(0)
    shiva_ext.load(tmp_path)
    assert torch.equal(torch.randn(3), wanted)


def test_saving_over_an_artefact_replaces_it_and_leaves_no_temporary_files(tmp_path):
    write(tmp_path)
    other = make_artifact(RatioTable.fixed(0.3, LAYERS), seed=11)
    shiva_ext.save(other, tmp_path)
    assert shiva_ext.load(tmp_path).table == other.table
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "shiva.safetensors"}


def test_the_files_are_json_and_safetensors(tmp_path):
    write(tmp_path, policy=make_policy())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["format"] == 1 and config["shiva_ext"] == shiva_ext.__version__
    assert {key.partition(".")[0] for key in load_file(tmp_path / "shiva.safetensors")} == {"router", "table", "policy"}


def edit_config(**changes):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        for key, value in changes.items():
            config.pop(key) if value is None else config.update({key: value})
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def truncate(folder):
    data = (folder / "shiva.safetensors").read_bytes()
    (folder / "shiva.safetensors").write_bytes(data[: len(data) // 2])


def edit_tensors(change):
    def damage(folder):
        tensors = load_file(folder / "shiva.safetensors")
        change(tensors)
        save_file(tensors, folder / "shiva.safetensors")

    return damage


def replace(tensors, name, value):
    tensors[name] = value


DAMAGE = {
    "truncated weights": truncate,
    "empty weights": lambda folder: (folder / "shiva.safetensors").write_bytes(b""),
    "no JSON": lambda folder: (folder / "config.json").write_text('{"format": 1,'),
    "a JSON list": lambda folder: (folder / "config.json").write_text("[1, 2]"),
    "binary config": lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"),
    "no format": edit_config(format=None),
    "no router": edit_config(router=None),
    "no metadata": edit_config(metadata=None),
    "unknown router option": edit_config(router={"dim": 64, "colour": "red"}),
    "impossible router": edit_config(router=dict(dim=64, temb_dim=64, pooled_dim=64, num_layers=0)),
    "another width": edit_config(router=dict(dim=32, temb_dim=64, pooled_dim=64, num_layers=LAYERS)),
    "a lost tensor": edit_tensors(lambda tensors: tensors.pop("router.groups.0.out.weight")),
    "a lost table": edit_tensors(lambda tensors: tensors.pop("table.ratios")),
    "a tensor too many": edit_tensors(lambda tensors: replace(tensors, "router.more", torch.zeros(2))),
    "ratios above 1": edit_tensors(lambda tensors: tensors["table.ratios"].mul_(3)),
    "NaN ratios": edit_tensors(lambda tensors: tensors["table.ratios"].fill_(torch.nan)),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_artefact_is_refused_by_name_and_the_model_untouched(case, tmp_path, model):
    write(tmp_path)
    DAMAGE[case](tmp_path)
    before = snapshot(model)
    with pytest.raises(ValueError, match="(?s)damaged .*download or train it again") as error:
        shiva_ext.enable(model, tmp_path)
    assert str(tmp_path) in str(error.value)
    assert_unchanged(model, before)


def test_a_later_format_asks_for_an_update(tmp_path, model):
    write(tmp_path)
    edit_config(format=2)(tmp_path)
    with pytest.raises(ValueError, match="artefact format 2, this version reads 1; update shiva_ext"):
        shiva_ext.enable(model, tmp_path)


@pytest.mark.parametrize("missing", ["config.json", "shiva.safetensors"])
def test_a_folder_without_its_files_is_not_an_artefact(missing, tmp_path, model):
    write(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match="not a Shiva artefact: it lacks config.json or shiva.safetensors"):
        shiva_ext.enable(model, tmp_path)


def test_an_artefact_that_promises_an_adapter_must_have_it(tmp_path, model):
    write(tmp_path)
    edit_config(adapter=True)(tmp_path)
    before = snapshot(model)
    with pytest.raises(
        FileNotFoundError, match="adapter_config.json.*get the whole artefact, or enable with adapter=F"
    ):
        shiva_ext.enable(model, tmp_path)
    assert_unchanged(model, before)
    with torch.no_grad(), shiva_ext.enable(model, tmp_path, adapter=False):
        model(**make_inputs())


def test_a_path_in_an_artefact_leads_nowhere_else(tmp_path, model):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "adapter_config.json").write_text("{}")
    folder = write(tmp_path / "artefact")
    config = json.loads((folder / "config.json").read_text()) | {"adapter": "../outside"}
    (folder / "config.json").write_text(json.dumps(config))
    assert shiva_ext.load(folder).adapter == folder / "adapter"
    before = snapshot(model)
    with pytest.raises((FileNotFoundError, ValueError), match="adapter"):
        shiva_ext.enable(model, folder)
    assert_unchanged(model, before)


def test_a_hub_id_is_taken_at_its_revision_and_without_one_there_is_a_warning(tmp_path, monkeypatch):
    folder, asked = write(tmp_path), []

    def snapshot_download(name, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shiva_ext.load("someone/sd35-shiva@0123abc").metadata == METADATA
    with pytest.warns(UserWarning, match="give its revision .'someone/sd35-shiva@<commit>'"):
        shiva_ext.load("someone/sd35-shiva")
    patterns = ["*.json", "*.safetensors"]  # nothing that could be unpickled is even downloaded
    assert asked == [("someone/sd35-shiva", "0123abc", patterns), ("someone/sd35-shiva", None, patterns)]
