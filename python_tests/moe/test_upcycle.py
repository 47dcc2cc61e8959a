"""Experts made of a dense model's MLPs, the published sizes, and their files."""

import json

import pytest
import torch
from diffusers import CogView4Transformer2DModel, DiTTransformer2DModel, FluxTransformer2DModel
from models.families import randomise
from models.tiny import LAYERS, WIDTH, make_inputs, make_model

from shiva_ext import moe
from shiva_ext.moe import MoEConfig, upcycle
from shiva_ext.moe.upcycle import routed_share

# arXiv 2407.11633 table 1, in millions, to the digits that the count itself gives.
TABLE = {
    "S/2-8E2A": (199.3, 71.9),
    "S/2-16E2A": (369.2, 71.9),
    "B/2-8E2A": (795.9, 286.3),
    "L/2-8E2A": (2823.8, 1011.8),
    "XL/2-8E2A": (4168, 1493),
    "G/2-16E2A": (16504, 3182),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_presets_have_the_published_numbers_of_parameters(name):
    with torch.device("meta"):
        model = moe.dit_moe(name)
    for got, wanted in zip(moe.count_parameters(model), TABLE[name], strict=True):
        assert abs(got / (1e6 * wanted) - 1) < 0.005


def test_a_fresh_preset_runs_and_begins_at_zero():
    model = moe.dit_moe("S/2-8E2A", num_classes=10, sample_size=8)
    x = torch.randn(2, 4, 8, 8)
    out = model(x, timestep=torch.tensor([3, 9]), class_labels=torch.tensor([0, 10]), return_dict=False)[0]
    assert out.shape == (2, 8, 8, 8) and not out.any()
    names = [name for name, _ in model.named_parameters() if ".emb." in name]
    assert names and all(name.startswith("transformer_blocks.0.") for name in names)  # one embedder for all


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"no preset 'M/2'; there are S/2-8E2A, "):
        moe.dit_moe("M/2")


def test_whole_experts_all_alike_give_the_dense_output_times_their_weights():
    model, inputs = make_model(), make_inputs()
    dense = [block.ff for block in model.transformer_blocks]
    layers = upcycle(model, MoEConfig(num_experts=4, top_k=2), router_std=0.0)
    assert list(layers) == [f"transformer_blocks.{i}.ff" for i in range(LAYERS)]
    x = torch.randn(3, 5, WIDTH)
    for old, new in zip(dense, layers.values(), strict=True):
        assert new.config.activation == "gelu-approximate" and new.config.bias and new.config.expert_width == 4 * WIDTH
        torch.testing.assert_close(new(x), old(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(**inputs)[0], make_model()(**inputs)[0], rtol=1e-3, atol=1e-3)


def test_a_random_router_begins_close_to_the_dense_output_in_the_mean():
    model = make_model()
    dense = model.transformer_blocks[1].ff
    layers = upcycle(model, MoEConfig(num_experts=8, top_k=2), router_std=0.1)
    x = torch.randn(4000, WIDTH)
    x = x / x.square().mean(dim=1, keepdim=True).sqrt()
    new, old = layers["transformer_blocks.1.ff"](x), dense(x)
    slope = ((new * old).sum() / old.square().sum()).item()
    assert abs(slope - 1) < 0.05


@pytest.mark.parametrize(("n", "K", "std"), [(8, 2, 0.0), (8, 8, 3.0), (16, 1, 0.0)])
def test_the_share_of_the_best(n, K, std):
    assert routed_share(n, K, std) == pytest.approx(K / n)
    assert routed_share(n, K, 50.0) > 0.9


def test_narrow_experts_take_random_hidden_units_of_their_own():
    model = make_model()
    dense = model.transformer_blocks[0].ff
    layer = upcycle(model, MoEConfig(num_experts=4, expert_width=2 * WIDTH), router_std=0.0)["transformer_blocks.0.ff"]
    rows = {tuple(row): i for i, row in enumerate(dense.net[0].proj.weight.tolist())}
    units = [[rows[tuple(row)] for row in expert] for expert in layer.experts.w_in.tolist()]
    assert all(len(set(unit)) == 2 * WIDTH and unit == sorted(unit) for unit in units)
    assert len({tuple(unit) for unit in units}) == 4
    for expert, unit in enumerate(units):
        scale = 2 * (4 / 2)
        torch.testing.assert_close(layer.experts.w_out[expert], dense.net[2].weight[:, unit] * scale)
        assert torch.equal(layer.experts.b_in[expert], dense.net[0].proj.bias[unit])
    total, active = moe.count_parameters(layer)
    assert active - layer.router.weight.numel() == pytest.approx(sum(p.numel() for p in dense.parameters()), rel=0.01)


def test_a_shared_expert_begins_at_nothing():
    plain, shared = make_model(), make_model()
    upcycle(plain, MoEConfig())
    upcycle(shared, MoEConfig(shared_width=32))
    inputs = make_inputs()
    torch.testing.assert_close(shared(**inputs)[0], plain(**inputs)[0])


def test_some_layers_alone_and_the_same_seed_again():
    first, second, third = make_model(), make_model(), make_model()
    assert list(upcycle(first, layers=[3, 1])) == ["transformer_blocks.3.ff", "transformer_blocks.1.ff"]
    upcycle(second, layers=[3, 1])
    upcycle(third, layers=[3, 1], seed=1)
    inputs = make_inputs()
    assert torch.equal(first(**inputs)[0], second(**inputs)[0])
    assert not torch.equal(first(**inputs)[0], third(**inputs)[0])


def test_gated_mlps_and_other_families():
    dit = randomise(
        DiTTransformer2DModel(
            num_attention_heads=1,
            attention_head_dim=64,
            in_channels=4,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=10,
            activation_fn="geglu",
        )
    )
    inputs = dict(timestep=torch.tensor([500]), class_labels=torch.tensor([3]), return_dict=False)
    x = torch.randn(1, 4, 8, 8)
    wanted = dit(x, **inputs)[0]
    upcycle(dit, MoEConfig(num_experts=3, top_k=2), router_std=0.0)
    torch.testing.assert_close(dit(x, **inputs)[0], wanted, rtol=1e-3, atol=1e-3)
    flux = FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
    )
    assert list(upcycle(flux)) == ["transformer_blocks.0.ff"]


def test_what_cannot_be_upcycled_is_refused_and_left_as_it_was():
    model = make_model()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"expert_width is 257, but transformer_blocks\.0\.ff has only 256 hidden"):
        upcycle(model, MoEConfig(expert_width=257))
    with pytest.raises(ValueError, match=r"no dense transformer_blocks\.4\.ff; there are transformer_blocks\.0\.ff"):
        upcycle(model, layers=[0, 4])
    model.transformer_blocks[2].ff.net[0] = torch.nn.ReLU()
    with pytest.raises(ValueError, match=r"transformer_blocks\.2\.ff has the activation ReLU"):
        upcycle(model)
    assert not any(isinstance(module, moe.SparseMoE) for module in model.modules())
    assert model.transformer_blocks[0].ff is before["transformer_blocks.0.ff"]
    model = make_model()
    upcycle(model)
    with pytest.raises(ValueError, match="experts already"):
        upcycle(model)
    with pytest.raises(ValueError, match="layers is empty"):
        upcycle(make_model(), layers=[])
    with pytest.raises(ValueError, match="Linear cannot be upcycled: no block has"):
        upcycle(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_and_loaded_it_is_the_same(tmp_path, dtype):
    model = make_model().to(dtype)
    upcycle(model, MoEConfig(num_experts=3, shared_width=16, capacity_factor=2.0), layers=[1, 3])
    moe.save(model, tmp_path)
    again, inputs = moe.load(tmp_path), make_inputs(dtype=dtype)
    assert again.dtype == dtype and not again.training
    with torch.no_grad():
        assert torch.equal(again(**inputs)[0], model(**inputs)[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moe.json", "moe.safetensors"]


def test_a_preset_is_saved_with_its_shared_embedder_and_its_norms(tmp_path, monkeypatch):
    monkeypatch.setitem(moe.PRESETS, "tiny", moe.presets.Preset(2, 64, 1, 4, qk_norm=True))
    model = randomise(moe.dit_moe("tiny", num_classes=10, sample_size=8))
    moe.save(model, tmp_path)
    again = moe.load(tmp_path)
    assert again.transformer_blocks[1].norm1.emb is again.transformer_blocks[0].norm1.emb
    call = dict(timestep=torch.tensor([3]), class_labels=torch.tensor([1]), return_dict=False)
    x = torch.randn(1, 4, 8, 8)
    assert torch.equal(again(x, **call)[0], model(x, **call)[0])


def test_every_weight_keeps_its_dtype(tmp_path):
    model, inputs = make_model().bfloat16(), make_inputs(dtype=torch.bfloat16)
    for layer in upcycle(model, MoEConfig(num_experts=3)).values():
        layer.router.float()
    moe.save(model, tmp_path)
    again = moe.load(tmp_path)
    assert again.transformer_blocks[0].ff.router.weight.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(again(**inputs)[0], model(**inputs)[0])


def test_norms_of_the_models_own_are_not_taken_for_ours(tmp_path):
    cogview = CogView4Transformer2DModel(
        num_layers=1, num_attention_heads=1, attention_head_dim=16, text_embed_dim=8, time_embed_dim=8, condition_dim=4
    )
    upcycle(cogview, MoEConfig(num_experts=2))
    moe.save(cogview, tmp_path)
    again = moe.load(tmp_path)
    assert type(again.transformer_blocks[0].attn1.norm_q) is torch.nn.LayerNorm


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    model = make_model()
    upcycle(model, MoEConfig(num_experts=3))
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"other weights than its config says, such as extra\.bias; merge or unload"):
        moe.save(model, tmp_path)

    class Own(type(model)):
        pass

    model.__class__ = Own
    with pytest.raises(ValueError, match="Own is no model of diffusers"):
        moe.save(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_mlps_with_a_dropout_at_their_end():
    model = make_model()
    for block in model.transformer_blocks:
        block.ff.net.append(torch.nn.Dropout(0.1).eval())
    wanted = model(**make_inputs())[0]
    upcycle(model, MoEConfig(num_experts=2), router_std=0.0)
    torch.testing.assert_close(model(**make_inputs())[0], wanted, rtol=1e-3, atol=1e-3)


def test_a_preset_drops_no_labels_by_itself():
    model = moe.dit_moe("S/2-8E2A", num_classes=10, sample_size=8).train()
    seen = []
    embedder = model.transformer_blocks[0].norm1.emb.class_embedder
    embedder.embedding_table.register_forward_hook(lambda m, args, out: seen.append(args[0].tolist()))
    model(torch.randn(64, 4, 8, 8), timestep=torch.zeros(64), class_labels=torch.full((64,), 3))
    assert all(labels == [3] * 64 for labels in seen)


def test_wrong_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no moe\.json; shiva_ext\.moe\.save"):
        moe.load(tmp_path)
    with pytest.raises(ValueError, match="no expert layer"):
        moe.save(make_model(), tmp_path)
    assert not list(tmp_path.iterdir())
    model = make_model()
    upcycle(model, MoEConfig(num_experts=3), layers=[0])
    moe.save(model, tmp_path)
    record = json.loads((tmp_path / "moe.json").read_text())
    for change, said in (
        ({"format": 99}, "format 99"),
        ({"model": "Nothing"}, "a Nothing, which diffusers"),
        ({"layers": {"transformer_blocks.0.ff": [64, {"num_experts": 5}]}}, r"does not fit moe\.json"),
    ):
        (tmp_path / "moe.json").write_text(json.dumps(record | change))
        with pytest.raises(ValueError, match=said):
            moe.load(tmp_path)


def test_experts_run_beside_a_selection():
    from models.tiny import make_artifact

    import shiva_ext

    model, inputs = make_model(), make_inputs()
    upcycle(model, MoEConfig(num_experts=4))
    dense = model(**inputs)[0]
    handle = shiva_ext.enable(model, make_artifact(1.0))
    torch.testing.assert_close(model(**inputs)[0], dense, rtol=1e-4, atol=1e-4)
    handle.disable()
    handle = shiva_ext.enable(model, make_artifact(0.5))
    assert not torch.allclose(model(**inputs)[0], dense, rtol=1e-3)
    handle.disable()
    assert torch.equal(model(**inputs)[0], dense)
