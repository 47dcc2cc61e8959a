"""DiffCR, DyDiT and SparseDiT: the published rules, with weights that were not trained."""

import contextlib
from dataclasses import replace

import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from models import families
from models import test_pixart as pixart
from models.families import build_dit
from models.test_flux import make_model as make_flux
from models.tiny import LAYERS, N, make_inputs, make_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import shiva_ext
from shiva_ext import MethodArtifact, hooks
from shiva_ext.methods import TRAINED, DiffCR, DyDiT, SparseDiT
from shiva_ext.methods.sparsedit import default_roles
from shiva_ext.models import adapter_for
from shiva_ext.training.method_trainer import MethodPass

SIX = dict(num_layers=6, num_attention_heads=2, caption_projection_dim=128)
ROLES = ("pool", "generate", "sparse", "sparse", "recover", "dense")
torch.manual_seed(0)


def build_pixart(**changes):
    return pixart.make_model(cross_attention_dim=128, **changes)


def fresh(method, model):
    """The method's untrained weights for a model, as an artefact."""
    torch.manual_seed(3)
    tensors = method.build(adapter_for(model), model).state_dict()
    return MethodArtifact(type(model).__name__, method, tensors)


def changed(artifact, **values):
    """The artefact with some weights set; a name may be the end of several."""
    tensors = dict(artifact.tensors)
    for end, value in values.items():
        for name in [name for name in tensors if name.endswith(end.replace("__", "."))]:
            tensors[name] = torch.as_tensor(value, dtype=tensors[name].dtype).expand_as(tensors[name]).clone()
    return replace(artifact, tensors=tensors)


def output(model, artifact=None, **inputs):
    inputs = make_inputs(**inputs)
    with torch.no_grad():
        if artifact is None:
            return model(**inputs)[0]
        with shiva_ext.enable(model, artifact):
            return model(**inputs)[0]


def block_io(model, artifact, layer, sigma=0.7, training=False):
    """Tokens [B,N,D] at the entry and the end of a block in a whole run."""
    seen = {}
    source = artifact.source(model)
    state = hooks.SelectionState(source, adapter_for(model))
    hooks.attach(model, state)
    state.at(sigma, fixed=True)
    block = adapter_for(model).blocks(model)[layer]
    forward = block.forward

    def spy(*args, **kwargs):
        found = forward(*args, **kwargs)
        seen["io"] = (kwargs.get("hidden_states", args[0] if args else None), found[1], found[0])
        return found

    block.forward = spy
    state.trainer = MethodPass(state) if training else None
    try:
        with torch.set_grad_enabled(training):
            seen["output"] = model(**make_inputs(sigma=sigma))[0]
    finally:
        block.forward = forward
        hooks.detach(model)
    return seen, source, state


# DiffCR


def test_diffcr_that_keeps_all_with_scores_of_one_is_the_dense_model():
    model = make_model()
    artifact = changed(fresh(DiffCR(), model), bias=100.0)  # sigmoid(100) is 1 in float32
    assert torch.equal(output(model, artifact), output(model))


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 1.0])
def test_diffcr_on_a_bin_is_one_run_of_the_layer(share):
    """Interpolated in training, single afterwards: the same output."""
    model = make_model()
    artifact = changed(fresh(DiffCR(), model), keep=share)
    train, *_ = block_io(model, artifact, 2, training=True)
    infer, *_ = block_io(model, artifact, 2)
    torch.testing.assert_close(train["output"].detach(), infer["output"], rtol=1e-5, atol=1e-5)


def test_diffcr_leaves_the_unselected_tokens_bit_for_bit():
    model = make_model()
    artifact = changed(fresh(DiffCR(), model), keep=0.5)
    seen, source, _ = block_io(model, artifact, 2)
    before, after, _ = seen["io"]
    score = torch.sigmoid(torch.nn.functional.linear(before, *source.weights.routers[2].parameters()))[..., 0]
    left = score.argsort(dim=1)[:, : N // 2]
    rows = torch.arange(len(before))[:, None]
    assert torch.equal(after[rows, left], before[rows, left])
    kept = score.argsort(dim=1)[:, N // 2 :]
    assert (after[rows, kept] != before[rows, kept]).any(dim=-1).all()


def test_diffcr_multiplies_the_update_by_the_score():
    model = make_model()
    artifact = changed(fresh(DiffCR(), model), weight=0.0, bias=0.0)  # every score 1/2, all tokens kept
    seen, *_ = block_io(model, artifact, 0)
    before, after, _ = seen["io"]
    dense, *_ = block_io(model, changed(artifact, bias=100.0), 0)
    torch.testing.assert_close(after, (before + dense["io"][1]) / 2, rtol=1e-5, atol=1e-5)


def test_diffcr_gradient_of_the_ratio_is_the_difference_of_the_bins():
    """d y / d rho = (y_hi - y_lo) / .1"""
    model = make_model()
    artifact = changed(fresh(DiffCR(first_layer=2), model), keep=0.62)
    outputs = {}
    for keep in (0.6, 0.7):
        each = changed(artifact, keep=1.0)
        each.tensors["keep"][2] = keep
        outputs[keep] = block_io(model, each, 2, training=True)[0]["io"][1].detach()
    each = changed(artifact, keep=1.0)
    each.tensors["keep"][2] = 0.62
    seen, source, _ = block_io(model, each, 2, training=True)
    direction = torch.randn(seen["io"][1].shape, generator=torch.Generator().manual_seed(5))
    source.weights.requires_grad_(True)
    seen, source, state = _with_gradient(model, each)
    (seen * direction).sum().backward()
    region = each.method.region(0.7)
    wanted = ((outputs[0.7] - outputs[0.6]) * direction).sum() / 0.1
    torch.testing.assert_close(source.weights.keep.grad[2, region], wanted, rtol=1e-3, atol=1e-3)
    mixed = 0.8 * outputs[0.6] + 0.2 * outputs[0.7]  # u = (.62 - .6) / .1
    torch.testing.assert_close(seen.detach(), mixed, rtol=1e-4, atol=1e-5)


def _with_gradient(model, artifact, layer=2):
    """A block's output with its graph to the method's weights."""
    source = artifact.source(model)
    source.weights.requires_grad_(True)
    state = hooks.SelectionState(source, adapter_for(model))
    hooks.attach(model, state)
    state.at(0.7, fixed=True)
    state.trainer = student = MethodPass(state)
    try:
        model(**make_inputs(sigma=0.7))
    finally:
        hooks.detach(model)
    return student.outputs[layer], source, state


@pytest.mark.parametrize(
    ("keep", "wanted"), [(1.0, 16), (0.96, 16), (0.94, 15), (0.5, 8), (0.449, 7), (0.31, 5), (0.2, 5)]
)
def test_diffcr_takes_the_nearest_bin_and_rounds_tokens_up(keep, wanted):
    model = make_model()
    handle = shiva_ext.enable(model, changed(fresh(DiffCR(), model), keep=keep)).record()
    model(**make_inputs())
    assert {index.shape[1] for index in handle.records[0]["kept"].values()} <= {wanted}
    assert shiva_ext.summary(model).kept[0] == (wanted,) * LAYERS
    handle.disable()


def test_diffcr_has_ratios_of_its_own_for_each_layer_and_region():
    model = make_model()
    artifact = fresh(DiffCR(regions=4), model)
    assert artifact.tensors["keep"].shape == (LAYERS, 4)
    artifact.tensors["keep"][:] = torch.tensor([0.3, 0.5, 0.7, 0.9])
    with shiva_ext.enable(model, artifact):
        found = shiva_ext.summary(model, steps=[1.0, 0.8, 0.6, 0.3, 0.1]).kept
    assert [row[1] for row in found] == [15, 15, 12, 8, 5]


def test_diffcr_starts_from_no_compression_and_is_pulled_to_its_budget():
    model = make_model()
    method = DiffCR(budget=0.6)
    weights = method.build(adapter_for(model), model)
    assert torch.equal(weights.keep, torch.ones(LAYERS, 4))
    term = method.penalty(weights, {}, 0.0)
    torch.testing.assert_close(term.item(), 3.0 * 0.4**2, rtol=1e-6, atol=0)
    term.backward()
    assert (weights.keep.grad > 0).all()  # a step of descent keeps less


# DyDiT


def test_dydit_with_its_first_weights_is_the_static_model():
    """At the published biases every gate is open, in training (but for a Gumbel draw of e-15) and after it."""
    model = make_model(**SIX)
    artifact = fresh(DyDiT(groups=8, width_bias=15.0, token_bias=35.0), model)
    assert torch.equal(output(model, artifact), output(model))
    seen, source, state = block_io(model, artifact, 2, training=True)
    torch.testing.assert_close(seen["output"].detach(), output(model), rtol=1e-4, atol=1e-5)
    for dynamic, static in state.scratch["flops"].values():
        assert torch.equal(dynamic, torch.full_like(dynamic, static))


def _closing(model, **settings):
    """Random gates, about half of them closed."""
    artifact = fresh(DyDiT(groups=8, **settings), model)
    generator = torch.Generator().manual_seed(7)
    for name, value in artifact.tensors.items():
        if not value.is_floating_point():
            continue  # the order of heads and channels
        wide = 3.0 if name.endswith("weight") else 0.0
        artifact.tensors[name] = wide * torch.randn(value.shape, generator=generator)
    return artifact


def test_dydit_sliced_is_dydit_masked(monkeypatch):
    model = make_model(num_layers=4, num_attention_heads=4, attention_head_dim=16, caption_projection_dim=64)
    artifact = _closing(model)
    sliced = output(model, artifact)
    dense = output(model)
    assert (sliced - dense).abs().max() > 0.05
    monkeypatch.setattr(DyDiT, "gate", lambda self, logits, training: (torch.sigmoid(logits) > 0.5).float())
    masked, _, state = block_io(model, artifact, 2, training=True)
    torch.testing.assert_close(masked["output"].detach(), sliced, rtol=1e-5, atol=1e-5)
    closed = [1 - (dynamic / static).mean().item() for dynamic, static in state.scratch["flops"].values()]
    assert all(0.1 < each < 0.9 for each in closed)


def test_dydit_counts_what_runs():
    """Its own share of operations is that of torch's counter, for what it counts: blocks without text."""
    model = build_dit(num_layers=3, num_attention_heads=4, attention_head_dim=16)
    inputs = families.dit_inputs(model)
    artifact = changed(_closing(model), up__weight=0.0, up__bias=50.0)  # all tokens; heads and channels half closed
    blocks = adapter_for(model).blocks(model)
    counts = []
    for source in (None, artifact):
        with contextlib.nullcontext() if source is None else shiva_ext.enable(model, source):
            counter = FlopCounterMode(display=False, mods=list(blocks))
            with torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH):
                model(**inputs)
            table = counter.get_flop_counts()
            names = [n for n in table if n.endswith((".attn1", ".ff"))]
            counts.append(sum(sum(table[name].values()) for name in names))
    source = artifact.source(model)
    state = hooks.SelectionState(source, adapter_for(model))
    hooks.attach(model, state)
    state.at(0.5, fixed=True)
    state.trainer = MethodPass(state)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(DyDiT, "gate", lambda self, logits, training: (torch.sigmoid(logits) > 0.5).float())
        model(**inputs)
    hooks.detach(model)
    dynamic, static = (sum(each[i] for each in state.scratch["flops"].values()) for i in (0, 1))
    assert 0.2 < dynamic[0] / static < 0.9
    assert counts[1] / counts[0] == pytest.approx(float(dynamic[0] / static), rel=1e-3)


def test_dydit_leaves_alone_what_its_gates_say():
    """Heads and channels depend on the noise level alone; the first of each always runs; tokens on the image."""
    model = make_model(num_layers=2, num_attention_heads=4, attention_head_dim=16, caption_projection_dim=64)
    artifact = changed(fresh(DyDiT(groups=8), model), heads__bias=-50.0, channels__bias=-50.0, up__bias=-50.0)
    source = artifact.source(model)
    seen, source, state = block_io(model, artifact, 1, training=True)  # -50 is never drawn open
    before, after, _ = seen["io"]
    assert (after != before).any()  # one head is left
    dynamic, static = state.scratch["flops"][1]
    D, tokens = model.inner_dim, N
    attention = 4 * tokens * D * D + 2 * tokens**2 * D
    torch.testing.assert_close(dynamic, torch.full_like(dynamic, attention / 4), rtol=1e-6, atol=0)
    assert static == attention + 8 * tokens * D * D


def test_dydit_flops_loss_has_the_right_sign():
    model = make_model(**SIX)
    artifact = fresh(DyDiT(groups=8, budget=0.5, ramp=0.0, width_bias=1.0, token_bias=1.0), model)
    torch.manual_seed(0)
    _, source, state = _with_gradient(model, artifact)
    artifact.method.penalty(source.weights, state.scratch, 1.0).backward()
    for routers in source.weights:
        for layer in (routers.heads, routers.channels, routers.up):
            assert (layer.bias.grad >= 0).all()  # above its share: descent closes gates
    assert sum(float(r.channels.bias.grad.sum()) for r in source.weights) > 0


def test_dydit_target_falls_from_one():
    method = DyDiT(budget=0.5, ramp=0.2)
    assert [method.wanted(p) for p in (0.0, 0.1, 0.2, 1.0)] == [1.0, 0.75, 0.5, 0.5]


def test_dydit_hard_gates_are_bernoulli_of_the_sigmoid():
    torch.manual_seed(0)
    logits = torch.tensor([-2.0, -0.5, 0.0, 1.0, 3.0]).repeat(40000, 1)
    for tau in (1.0, 5.0):
        share = DyDiT(tau=tau).gate(logits, True).mean(dim=0)
        torch.testing.assert_close(share, torch.sigmoid(logits[0]), rtol=0, atol=0.01)


# SparseDiT


def test_sparsedit_recovery_starts_as_the_identity():
    model = make_model(**SIX)
    weights = SparseDiT(roles=ROLES).build(adapter_for(model), model)
    assert torch.equal(weights.sparse["4"].weight, torch.zeros(128, 128))
    assert torch.equal(weights.dense["4"].weight, torch.eye(128))


def test_sparsedit_schedule_is_the_published_one():
    method = SparseDiT(high=1 - 36 / 256, low=1 - 100 / 256)
    assert [method.rate(p) for p in (0.0, 0.1, 0.2499)] == [method.high] * 3
    assert abs(method.rate(0.25) - method.high) < 1e-9 and abs(method.rate(1.0) - method.low) < 1e-9
    sides = [method.coarse_grid((16, 16), p / 100) for p in range(101)]
    assert sides[0] == (6, 6) and sides[-1] == (10, 10) and sides == sorted(sides)


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        (28, ("pool",) * 2 + ("generate", "sparse", "sparse", "sparse", "recover", "dense") * 4 + ("dense",) * 2),
        (6, ROLES),
        (5, ("pool", "generate", "sparse", "recover", "dense")),
    ],
)
def test_sparsedit_roles_of_the_paper(layers, wanted):
    assert default_roles(layers) == wanted


def test_sparsedit_blocks_run_on_the_coarse_grid():
    model = make_model(**SIX)
    artifact = fresh(SparseDiT(high=0.75, low=0.75, roles=ROLES), model)
    tokens = {}
    handle = shiva_ext.enable(model, artifact)
    for layer, block in enumerate(model.transformer_blocks):
        block.register_forward_hook(
            lambda module, args, kwargs, found, layer=layer: tokens.update(
                {layer: (kwargs["hidden_states"].shape[1], found[1].shape[1])}
            ),
            with_kwargs=True,
        )
    model(**make_inputs())
    assert tokens == {0: (16, 16), 1: (16, 4), 2: (4, 4), 3: (4, 4), 4: (4, 16), 5: (16, 16)}
    assert shiva_ext.summary(model).kept[0] == (16, 4, 4, 4, 16, 16)
    handle.disable()


def test_sparsedit_generation_is_the_block_with_other_queries():
    """Against the block's own modules: pooled tokens ask, all tokens are asked."""
    model = make_model(**SIX)
    roles = ("dense", "generate", "sparse", "sparse", "recover", "dense")
    seen, *_ = block_io(model, fresh(SparseDiT(high=0.75, low=0.75, roles=roles), model), 1)
    x, got, _ = seen["io"]
    inputs, captured = make_inputs(sigma=0.7), {}
    model.transformer_blocks[1].register_forward_pre_hook(
        lambda module, args, kwargs: captured.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
        block, temb, text = model.transformer_blocks[1], captured["temb"], captured["encoder_hidden_states"]
        assert torch.equal(captured["hidden_states"], x)
        pooled = x.view(2, 2, 2, 2, 2, -1).mean(dim=(2, 4)).flatten(1, 2)
        norm, gate, shift, scale, gate_mlp = block.norm1(pooled, emb=temb)
        keys = block.norm1(x, emb=temb)[0]
        normed_text = block.norm1_context(text, emb=temb)[0]
        attn = block.attn

        def heads(y):
            return y.unflatten(-1, (2, 64)).transpose(1, 2)

        q = torch.cat(
            [attn.norm_q(heads(attn.to_q(norm))), attn.norm_added_q(heads(attn.add_q_proj(normed_text)))], dim=2
        )
        k = torch.cat(
            [attn.norm_k(heads(attn.to_k(keys))), attn.norm_added_k(heads(attn.add_k_proj(normed_text)))], dim=2
        )
        v = torch.cat([heads(attn.to_v(keys)), heads(attn.add_v_proj(normed_text))], dim=2)
        y = torch.softmax(q @ k.transpose(-1, -2) / 8, dim=-1) @ v
        tokens = pooled + gate[:, None] * attn.to_out[0](y.transpose(1, 2).flatten(2)[:, :4])
        hidden = block.norm2(tokens) * (1 + scale[:, None]) + shift[:, None]
        wanted = tokens + gate_mlp[:, None] * block.ff(hidden)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_sparsedit_pooling_block_is_attention_with_equal_weights():
    model = make_model(**SIX)
    seen, *_ = block_io(model, fresh(SparseDiT(roles=("pool", "dense", "dense", "dense", "dense", "dense")), model), 0)
    for linear in (model.transformer_blocks[0].attn.to_q, model.transformer_blocks[0].attn.add_q_proj):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)  # all scores 0: softmax is the mean
    wanted, *_ = block_io(model, fresh(DiffCR(bias=100.0), model), 0)
    torch.testing.assert_close(seen["io"][1], wanted["io"][1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen["io"][2], wanted["io"][2], rtol=1e-4, atol=1e-5)  # the text's


@pytest.mark.parametrize(
    "roles",
    [
        ("generate", "dense", "recover"),
        ("sparse", "recover"),
        ("generate", "sparse"),
        ("generate", "generate", "recover"),
        ("recover",),
        ("soup",),
    ],
)
def test_sparsedit_refuses_roles_out_of_order(roles):
    with pytest.raises(ValueError, match="role"):
        SparseDiT(roles=roles)


# All three


METHODS = {"diffcr": DiffCR(), "dydit": DyDiT(groups=8), "sparsedit": SparseDiT()}


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize(
    ("build", "inputs"),
    [(build_dit, families.dit_inputs), (build_pixart, lambda model: pixart.make_inputs())],
    ids=["dit", "pixart"],
)
def test_runs_on_the_other_families_it_knows(name, build, inputs):
    """Whatever half of the tokens, heads or blocks: the model runs, and is as before afterwards."""
    model = build(num_layers=6, num_attention_heads=2)
    inputs = inputs(model)
    with torch.no_grad():
        before = model(**inputs)[0]
        with shiva_ext.enable(model, changed(fresh(METHODS[name], model), keep=0.5, heads__bias=-1.0)):
            inside = model(**inputs)[0]
        after = model(**inputs)[0]
    assert inside.shape == before.shape and torch.isfinite(inside).all() and not torch.equal(inside, before)
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", TRAINED)
def test_half_precision_is_the_same_method(name):
    """The same tokens and heads, and outputs within bfloat16's rounding."""
    model = make_model(**SIX)
    artifact = changed(fresh(METHODS[name], model), keep=0.5, heads__bias=-1.0, up__bias=0.0)
    wanted = output(model, artifact)
    got = output(model.to(torch.bfloat16), artifact, dtype=torch.bfloat16)
    assert got.dtype == torch.bfloat16
    error = (got.float() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
    assert error < 0.2


@pytest.mark.parametrize("name", ["dydit", "sparsedit"])
def test_refuses_a_family_whose_blocks_it_does_not_know(name):
    model = make_flux()
    with pytest.raises(TypeError, match="knows those of SD3, DiT and PixArt"):
        METHODS[name].build(adapter_for(model), model)


@pytest.mark.parametrize("name", TRAINED)
def test_an_artefact_comes_back_as_it_was_saved(name, tmp_path):
    model = make_model(**SIX)
    artifact = fresh(METHODS[name], model)
    artifact = changed(artifact, keep=0.5, heads__bias=-1.0)
    artifact.save(tmp_path / "a")
    found = shiva_ext.load(tmp_path / "a")
    assert type(found) is MethodArtifact and found.method == artifact.method
    assert torch.equal(output(model, found), output(model, artifact))
    with torch.no_grad(), shiva_ext.enable(model, tmp_path / "a"):
        assert torch.equal(model(**make_inputs())[0], output(make_model(**SIX), artifact))


def test_refusals_say_what_to_do(tmp_path):
    model = make_model(**SIX)
    with pytest.raises(TypeError, match="train it"):
        shiva_ext.enable(model, DiffCR())
    artifact = fresh(DiffCR(), model)
    artifact.save(tmp_path)
    with pytest.raises(ValueError, match="give it others"):
        shiva_ext.enable(model, tmp_path, budget=0.5)
    with pytest.raises(ValueError, match="another size"):
        shiva_ext.enable(make_model(), tmp_path)
    with pytest.raises(ValueError, match="shiva_ext.load"):
        shiva_ext.ShivaArtifact.load(tmp_path)
    with pytest.raises(ValueError, match="reconstruct"):
        shiva_ext.enable(model, tmp_path, reconstruct="last")
    (tmp_path / "shiva.safetensors").write_bytes(b"none")
    with pytest.raises(ValueError, match="damaged"):
        shiva_ext.load(tmp_path)


def test_strength_can_be_changed_without_training():
    model = make_model()
    artifact = changed(fresh(DiffCR(), model), keep=0.7)
    counts = []
    for shift in (-0.2, 0.0, 0.2):
        with shiva_ext.enable(model, artifact.with_settings(shift=shift)):
            counts.append(shiva_ext.summary(model).kept[0][1])
    assert counts == [8, 12, 15]


@pytest.mark.parametrize(("name", "setting"), [("diffcr", "budget"), ("dydit", "tau"), ("sparsedit", "regions")])
def test_settings_of_the_training_cannot_be_changed_afterwards(name, setting):
    found = fresh(METHODS[name], make_model(**SIX))
    with pytest.raises(ValueError, match=f"{setting} of .* is a setting of its training"):
        found.with_settings(**{setting: 0.5})


def test_summary_says_where_its_numbers_are_bounds():
    model = make_model(**SIX)
    with shiva_ext.enable(model, fresh(METHODS["dydit"], model)):
        found = shiva_ext.summary(model)
        assert "at least" in str(found) and "DyDiT" in found.note
    with shiva_ext.enable(model, fresh(METHODS["diffcr"], model)):
        assert shiva_ext.summary(model).note == ""


def test_sparsedit_says_what_it_cannot_reach():
    model = make_model(**SIX)
    adapter = adapter_for(model)
    for budget in (0.6, 0.8):
        method = SparseDiT.for_budget(budget, adapter, model)
        grid = [method.rate(i / 1000) for i in range(1000)]
        assert 1 - sum(grid) / 1000 * 3 / 6 == pytest.approx(budget, abs=0.02)
    with pytest.raises(ValueError, match="no less than 0.55"):
        SparseDiT.for_budget(0.5, adapter, model)


def test_sparsedit_refuses_a_first_layer_inside_a_stretch():
    model = make_model(**SIX)
    with pytest.raises(ValueError, match="inside the stretch of blocks 1 to 4"):
        SparseDiT(first_layer=2).build(adapter_for(model), model)


def test_sparsedit_recovery_by_hand():
    """W1 of the spread coarse tokens, W2 of the fine ones, positions; then the block with the coarse ones as keys."""
    model = make_model(**SIX)
    artifact = fresh(SparseDiT(high=0.75, low=0.75, roles=ROLES), model)
    torch.manual_seed(6)
    for name in ("sparse.4.weight", "dense.4.weight", "position.4"):
        artifact.tensors[name] = torch.randn(artifact.tensors[name].shape) / 8
    coarse = block_io(model, artifact, 4)[0]["io"][0]
    fine = block_io(model, artifact, 1)[0]["io"][0]
    seen = {}
    norm = model.transformer_blocks[4].norm1
    handle = norm.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    block_io(model, artifact, 4)
    handle.remove()
    spread = coarse.view(2, 2, 1, 2, 1, -1).expand(2, 2, 2, 2, 2, -1).flatten(1, 4)
    table = get_2d_sincos_pos_embed(128, (4, 4), base_size=4, output_type="pt")
    wanted = spread @ artifact.tensors["sparse.4.weight"].T + fine @ artifact.tensors["dense.4.weight"].T
    wanted = wanted + artifact.tensors["position.4"] * table.float()
    torch.testing.assert_close(seen["x"], torch.cat([wanted, coarse], dim=1), rtol=1e-4, atol=1e-5)
