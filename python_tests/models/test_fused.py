"""The fused form of each family's blocks against the same blocks wrapped, which other tests hold against indexing."""

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from torch.utils._python_dispatch import TorchDispatchMode

import shiva_ext
from shiva_ext.models import fused

from . import families, tiny
from . import test_flux as flux
from . import test_pixart as pixart

DUAL = dict(dual_attention_layers=(0, 1, 2))
CASES = {
    "sd3": (lambda: tiny.make_model(), lambda m, **o: tiny.make_inputs(**o)),
    "sd3.5, two attentions": (lambda: tiny.make_model(**DUAL), lambda m, **o: tiny.make_inputs(**o)),
    "flux": (lambda: flux.make_model(guidance_embeds=True), flux.make_inputs),
    "pixart": (lambda: pixart.make_model(), lambda m, **o: pixart.make_inputs(**o)),
    "pixart, two heads": (
        lambda: pixart.make_model(num_attention_heads=2, attention_head_dim=32),
        lambda m, **o: pixart.make_inputs(**o),
    ),
}
for family in ("dit", "qwenimage"):
    CASES[family] = (families.FAMILIES[family].build, families.FAMILIES[family].inputs)
ARTIFACTS = {"sd3": lambda m: tiny.make_artifact(tiny.varying_table()), "flux": flux.make_artifact}
ARTIFACTS |= dict.fromkeys(("dit", "qwenimage"), lambda m: families.make_artifact(m, families.table(4)))
ARTIFACTS["pixart"] = lambda m: pixart.make_artifact(m, pixart.table())


def make(name: str, dtype=torch.float32, **options):
    """A model of a case, its artefact, and inputs of one call."""
    family = next(key for key in ARTIFACTS if name.startswith(key))
    build, inputs = CASES[name]
    model = build().to(dtype)
    source = ARTIFACTS[family](model)
    source.router.to(dtype)
    call = {
        key: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() and key != "timestep" else value
        for key, value in inputs(model, **options).items()
    }
    return model, source, call


def run(model, source, inputs, fused: bool):
    """The output, the kept tokens, and the layers that ran wrapped."""
    with shiva_ext.enable(model, source, fused=fused) as handle:
        handle.record()
        output = model(**inputs)[0]
        return output, handle.records[0]["kept"], shiva_ext.summary(model, steps=1).wrapped


class Keeps:
    """A selector that keeps given tokens, whatever it sees."""

    def __init__(self, kept: dict, layers: int, N: int):
        self.kept, self.N = kept, N
        self.row = tuple(kept[layer].shape[1] / N if layer in kept else 1.0 for layer in range(layers))

    def ratios(self, sigma):
        return self.row

    def scores(self, layer, x, sigma, conditioning):
        return torch.zeros(len(x), self.N).scatter_(1, self.kept[layer], 1.0)


class Ops(TorchDispatchMode):
    """Names of this package's ops that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "shiva":
            self.names.append(func._schema.name.removeprefix("shiva::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_it_equals_the_wrapped_block(name, batch):
    model, source, inputs = make(name, torch.float64, batch=batch)
    wanted, wanted_kept, reasons = run(model, source, inputs, fused=False)
    assert set(reasons.values()) == {"fused=False"} and len(reasons) == len(wanted_kept)
    got, kept, wrapped = run(model, source, inputs, fused=True)
    assert wrapped == {}
    assert all(torch.equal(kept[layer], wanted_kept[layer]) for layer in wanted_kept)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_gathered_tokens_are_not_written_for_nothing(name):
    model, source, inputs = make(name)
    with shiva_ext.enable(model, source), Ops() as ops:
        model(**inputs)
    assert "gather_modulate" in ops.names
    if name.startswith("sd3") or name == "dit":
        assert "scatter_residual" in ops.names and not {"token_gather", "token_scatter"} & set(ops.names)
    with shiva_ext.enable(model, source, fused=False), Ops() as ops:
        model(**inputs)
    assert not {"gather_modulate", "scatter_residual"} & set(ops.names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_in_half_precision_it_is_no_further_from_the_exact_result(name, dtype):
    model, source, inputs = make(name, dtype)
    _, kept, _ = run(model, source, inputs, fused=True)
    layers = source.table.num_layers
    selector = Keeps(kept, layers, tiny.N)
    wide, _, wide_inputs = make(name, torch.float64)
    wide.load_state_dict({key: value.double() for key, value in model.state_dict().items()})
    wide_inputs |= {
        key: value.double()
        for key, value in inputs.items()
        if torch.is_tensor(value) and value.is_floating_point() and key != "timestep"
    }
    exact = run(wide, selector, wide_inputs, fused=False)[0]
    errors = [(run(model, selector, inputs, fused=f)[0].double() - exact).square().mean() for f in (True, False)]
    assert errors[0] <= 1.3 * errors[1], errors


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_under_autocast_both_forms_agree(name):
    model, source, inputs = make(name)
    with torch.autocast("cpu", torch.bfloat16):
        got, kept, wrapped = run(model, source, inputs, fused=True)
        selector = Keeps(kept, source.table.num_layers, tiny.N)
        wanted = run(model, selector, inputs, fused=False)[0]
    assert wrapped == {} and got.dtype == wanted.dtype
    assert (got - wanted).float().square().mean() < 2**-12 * wanted.float().square().mean()


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_the_wrapped_ones(name):
    model, source, inputs = make(name, torch.float64)
    found = []
    for form in (True, False):
        image = inputs["hidden_states"].clone().requires_grad_()
        model.zero_grad()
        run(model, source, {**inputs, "hidden_states": image}, fused=form)[0].square().sum().backward()
        found.append({key: p.grad for key, p in model.named_parameters()} | {"image": image.grad})
    for key, wanted in found[1].items():
        got = found[0][key]
        assert (got is None) == (wanted is None), key
        if wanted is not None:
            torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8, msg=key)


class Doubling(ModelHook):
    def post_forward(self, module, output):
        return tuple(None if part is None else 2 * part for part in output)


def listen(model):
    calls = []
    model.transformer_blocks[2].norm2.register_forward_hook(lambda *args: calls.append(1))
    return lambda: calls


def before_the_adaptive_norm(model):
    calls = []
    model.transformer_blocks[2].norm1.register_forward_pre_hook(lambda *args: calls.append(1))
    return lambda: calls


def chunk(model):
    model.transformer_blocks[2].set_chunk_feed_forward(1, 1)


def another_hook(model):
    HookRegistry.check_if_exists_or_initialize(model.transformer_blocks[2]).register_hook(Doubling(), "doubling")


def replaced_norm(model):
    model.transformer_blocks[2].norm2 = torch.nn.LayerNorm(tiny.WIDTH)


def replaced_block(model):
    class Mine(JointTransformerBlock):
        pass

    model.transformer_blocks[2].__class__ = Mine


def own_forward(model):
    norm = model.transformer_blocks[2].norm2
    norm.forward = lambda x: 3 * x


def own_block_forward(model):
    block = model.transformer_blocks[2]
    original = block.forward
    block.forward = lambda *args, **kwargs: tuple(None if part is None else -part for part in original(*args, **kwargs))


@pytest.mark.parametrize(
    "change, reason",
    [
        (listen, "norm2 has a hook"),
        (before_the_adaptive_norm, "norm1 has a hook"),
        (chunk, "feed-forward is cut in chunks"),
        (another_hook, "another hook changes the block's forward"),
        (replaced_norm, "norm2 is not a LayerNorm without weights"),
        (replaced_block, "Mine has no fused form"),
        (own_forward, "norm2 has a hook"),
        (own_block_forward, "another hook changes the block's forward"),
    ],
)
@torch.no_grad()
def test_a_block_that_is_not_as_known_runs_wrapped_and_says_so(change, reason):
    model, source, inputs = make("sd3")
    heard = change(model)
    wanted, kept, _ = run(model, source, inputs, fused=False)
    if heard is not None:
        heard().clear()
    with shiva_ext.enable(model, source):
        got = model(**inputs)[0]
        summary = shiva_ext.summary(model, steps=1)
    assert list(summary.wrapped) == [2] and reason in summary.wrapped[2]
    assert f"2 pruned blocks run fused; wrapped L2: {summary.wrapped[2]}" in str(summary)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    if heard is not None:
        assert len(heard()) == 1


def test_a_hook_that_comes_after_enable_is_heard_too():
    model, source, inputs = make("sd3")
    with shiva_ext.enable(model, source), torch.no_grad():
        assert shiva_ext.summary(model, steps=1).wrapped == {}
        heard = listen(model)
        model(**inputs)
        assert heard() == [1] and list(shiva_ext.summary(model, steps=1).wrapped) == [2]


def test_another_version_of_diffusers_is_noticed(monkeypatch):
    model, source, inputs = make("sd3")
    original = JointTransformerBlock.forward

    def forward(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs=None):
        text, image = original(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)
        return text, image + 1

    monkeypatch.setattr(JointTransformerBlock, "forward", forward)
    fused.fingerprint.cache_clear()
    with torch.no_grad():
        wanted, _, _ = run(model, source, inputs, fused=False)
        got, _, wrapped = run(model, source, inputs, fused=True)
    fused.fingerprint.cache_clear()
    assert torch.equal(got, wanted) and list(wrapped) == [1, 2, 3]
    assert "another JointTransformerBlock or AdaLayerNormZero" in wrapped[1]


def test_a_forward_without_source_is_not_known(monkeypatch):
    monkeypatch.setattr(fused.inspect, "getsource", lambda *args: (_ for _ in ()).throw(OSError("no source")))
    fused.fingerprint.cache_clear()
    model, source, _ = make("sd3")
    with shiva_ext.enable(model, source):
        assert "another JointTransformerBlock" in shiva_ext.summary(model, steps=1).wrapped[1]
    fused.fingerprint.cache_clear()


def test_comments_and_annotations_do_not_count():

    class One:
        def forward(self, x: int) -> int:
            """What it does."""
            return x + 1  # adds one

    class Two:
        def forward(self, x):
            # the same
            return x + 1

    class Three:
        def forward(self, x):
            return x + 2

    one, two, three = One.forward, Two.forward, Three.forward
    assert fused.fingerprint(one) == fused.fingerprint(two) != fused.fingerprint(three)
    assert fused.fingerprint(one, two) != fused.fingerprint(two, three)


@pytest.mark.parametrize("name, first", [("flux", flux.DOUBLE), ("qwenimage", 1)])
def test_a_float16_output_is_clipped_wrapped(name, first):
    model, source, inputs = make(name, torch.float16)
    with torch.no_grad():
        _, kept, wrapped = run(model, source, inputs, fused=True)
    assert wrapped == {layer: "its float16 output is clipped" for layer in kept if layer >= first}


def test_pixart_with_weights_in_its_norms_runs_wrapped():
    model = pixart.make_model(norm_elementwise_affine=True)
    with shiva_ext.enable(model, pixart.make_artifact(model)), torch.no_grad():
        model(**pixart.make_inputs())
        wrapped = shiva_ext.summary(model, steps=1).wrapped
    assert set(wrapped.values()) == {"norm1 is not a LayerNorm without weights"} and len(wrapped) == 3


def test_a_norm_that_is_replaced_after_enable_is_noticed():
    model, source, inputs = make("sd3")
    with shiva_ext.enable(model, source), torch.no_grad():
        block = model.transformer_blocks[2]
        block.norm2 = torch.nn.LayerNorm(tiny.WIDTH, elementwise_affine=True)
        torch.nn.init.constant_(block.norm2.weight, 3.0)
        fused_output = model(**inputs)[0]
        assert shiva_ext.summary(model, steps=1).wrapped == {2: "norm2 is not a LayerNorm without weights"}
        block.norm1 = torch.nn.ModuleList()
        assert shiva_ext.summary(model, steps=1).wrapped == {2: "norm1 was replaced"}
    other, source, inputs = make("sd3")
    other.transformer_blocks[2].norm2 = model.transformer_blocks[2].norm2
    with torch.no_grad():
        torch.testing.assert_close(fused_output, run(other, source, inputs, fused=False)[0], rtol=1e-4, atol=1e-4)


def test_blocks_that_leave_nothing_out_are_not_counted_as_fused():
    model, source, _ = make("sd3")
    shiva_ext.enable(model, source, ratio=1.0)
    assert "0 pruned blocks run fused" in str(shiva_ext.summary(model))
    half, source, _ = make("flux", torch.float16)
    shiva_ext.enable(half, source)
    wrapped = shiva_ext.summary(half, num_tokens=tiny.N, steps=1).wrapped  # before any call
    assert set(wrapped.values()) == {"its float16 output is clipped"}


def test_qwen_image_with_two_timesteps_a_sample_runs_wrapped():
    family = families.FAMILIES["qwenimage"]
    model = family.build(**family.configs["edit"])
    with shiva_ext.enable(model, families.make_artifact(model)):
        wrapped = shiva_ext.summary(model, num_tokens=family.N, steps=1).wrapped
    assert set(wrapped.values()) == {"zero_cond_t is True"}


def test_comments_do_not_hide_a_change_in_a_method_that_is_restated(monkeypatch):
    original = QwenImageTransformerBlock._modulate
    monkeypatch.setattr(QwenImageTransformerBlock, "_modulate", lambda self, *args: original(self, *args))
    model, source, _ = make("qwenimage")
    with shiva_ext.enable(model, source):
        wrapped = shiva_ext.summary(model, steps=1).wrapped
    assert set(wrapped.values()) == {"the installed diffusers has another QwenImageTransformerBlock"}
