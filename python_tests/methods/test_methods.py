"""The methods on a tiny SD3: what each must hold to, and what it refuses."""

import math

import pytest
import torch
from torch import nn

import shiva_ext
from python_tests.models.families import FAMILIES
from python_tests.models.tiny import LAYERS, WIDTH, N, make_inputs, make_model, make_pipeline
from shiva_ext.methods import IBTM, METHODS, SDTM, ToFu, ToMA, ToMeSD
from shiva_ext.methods.memory import RunMemory
from shiva_ext.methods.toma import facility_location, tiles_of_tokens
from shiva_ext.selection import RandomSelector

BOTH = ("attention", "mlp")
EVERY = [
    ToMeSD(),
    ToMeSD(sites=BOTH),
    ToMeSD(sites=("block",), first_layer=1),
    ToFu(depth=2),
    ToFu(depth=2, sites=("block",)),
    ToMA(),
    ToMA(sites=BOTH, reuse_blocks=False),
    IBTM(),
    IBTM(similarity="cosine", sites=BOTH),
    SDTM(),
]
LEVELS = (0.95, 0.8, 0.6, 0.4, 0.2)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def run(model, method, levels=LEVELS, batch=4, **options):
    """Outputs of a run, and what was recorded."""
    with shiva_ext.enable(model, method, batched_guidance=True, **options) as handle:
        handle.record()
        outputs = [model(**make_inputs(batch, sigma=sigma))[0] for sigma in levels]
    return outputs, handle


def ident(method):
    return f"{type(method).__name__}-{'-'.join(method.sites)}"


@pytest.mark.parametrize("method", EVERY, ids=ident)
def test_it_changes_the_output_is_repeatable_and_leaves_nothing(method):
    model = make_model()
    dense = [model(**make_inputs(4, sigma=sigma))[0] for sigma in LEVELS]
    first, _ = run(model, method)
    assert any(not torch.equal(a, b) for a, b in zip(first, dense, strict=True))
    assert all(torch.isfinite(a).all() for a in first)
    again, _ = run(model, method)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    after = [model(**make_inputs(4, sigma=sigma))[0] for sigma in LEVELS]
    assert all(torch.equal(a, b) for a, b in zip(dense, after, strict=True))
    assert not any(hasattr(m, "_diffusers_hook") for m in model.modules())


@pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS)
def test_ratio_zero_is_the_dense_model_bit_for_bit(cls):
    settings = {"ToFu": {"depth": 2}, "SDTM": {"swing": 0.0}}.get(cls.__name__, {})
    model = make_model()
    outputs, handle = run(model, cls(ratio=0.0, **settings))
    for sigma, output in zip(LEVELS, outputs, strict=True):
        assert torch.equal(output, model(**make_inputs(4, sigma=sigma))[0])
    assert all(not record["kept"] for record in handle.records)


class Spy:
    """Counts the tokens that a module is called with."""

    def __init__(self, module: nn.Module):
        self.seen = []
        self.handle = module.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module, args, kwargs):
        self.seen.append((kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).shape[1])


@pytest.mark.parametrize(
    ("sites", "attention", "mlp"),
    [(("attention",), 8, N), (("mlp",), N, 8), (BOTH, 8, 8), (("block",), 8, 8)],
)
def test_modules_run_on_as_many_tokens_as_said(sites, attention, mlp):
    model = make_model()
    method = ToMeSD(0.5, sites=sites, first_layer=1)
    with torch.no_grad(), shiva_ext.enable(model, method, batched_guidance=True):
        block = model.transformer_blocks
        spies = [Spy(block[0].attn.to_q), Spy(block[2].attn.to_q), Spy(block[2].ff.net[0].proj)]
        model(**make_inputs(4))
        assert [spy.seen for spy in spies] == [[N], [attention], [mlp]]
        summary = shiva_ext.summary(model)
    assert method.tokens(2, N, 0.5) == (attention, mlp) and method.tokens(0, N, 0.5) == (N, N)
    assert summary.flop_speedup > 1 and summary.kept[0][0] == N and summary.kept[0][2] == 8


def test_whole_blocks_add_what_they_add_to_merged_tokens():
    """x + unmerge(block(m) - m), by hand, on the only block that merges."""
    model = make_model(num_layers=2)
    seen = {}

    def look(module, args, kwargs, output):
        seen["m"], seen["y"] = kwargs["hidden_states"], output[1]

    with torch.no_grad(), shiva_ext.enable(model, ToMA(0.5, scale=20.0), batched_guidance=False) as handle:
        handle.record()
        block = model.transformer_blocks[1]
        hook = model.transformer_blocks[0].register_forward_hook(
            lambda m, a, k, out: seen.update(x=out[1]), with_kwargs=True
        )
        inner = block.norm1.register_forward_pre_hook(lambda m, args: seen.update(m=args[0]))
        last = model.norm_out.register_forward_pre_hook(lambda m, args: seen.update(out=args[0]))
        model(**make_inputs(2))
        for each in (hook, inner, last):
            each.remove()
        merge = ToMA(0.5, scale=20.0).match(seen["x"], (4, 4))
        torch.testing.assert_close(merge.merge(seen["x"]), seen["m"])
    assert seen["out"].shape == seen["x"].shape and seen["m"].shape[1] == N // 2


def test_guided_halves_share_their_destinations():
    _, handle = run(make_model(), IBTM(destinations=0.5))
    found = handle.records[2]["kept"][1]
    assert torch.equal(found[:2], found[2:])


def test_ibtm_needs_guidance_and_starts_dense():
    model = make_model()
    with pytest.raises(ValueError, match="batched_guidance=True"), torch.no_grad():
        with shiva_ext.enable(model, IBTM(), batched_guidance=False):
            model(**make_inputs(4))
    _, handle = run(model, IBTM(plain_steps=3))
    assert [bool(record["kept"]) for record in handle.records] == [False, False, False, True, True]


def test_ibtm_takes_destinations_from_the_important_and_merges_the_others_first():
    method, x = IBTM(0.5, destinations=0.25), torch.randn(2, N, 8)
    importance = torch.rand(1, N)
    groups = method.match(x, importance, 8, (4, 4), key=7)
    important = importance.topk(8).indices[0].tolist()
    for b in range(2):
        joined = groups.leaders[b][groups.position[b][groups.merged[b]]].tolist()
        assert set(joined) <= set(important)
        assert sorted(groups.merged[b].tolist()) == sorted(set(range(N)) - set(important))
    # With as many to merge as lie outside the pool, none inside it goes; with fewer, all that go are outside.
    few = method.match(x, importance, 3, (4, 4), key=7)
    pool = importance.topk(int((N - 3) * method.pool)).indices[0].tolist()
    assert set(few.merged[0].tolist()) == set(range(N)) - set(pool)


def test_ibtm_merges_into_the_nearest_destination():
    method = IBTM(0.5, destinations=0.25)
    groups = method.match(torch.randn(2, N, 8), torch.rand(1, N), 8, (4, 4), key=3)
    place = lambda i: (int(i) // 4, int(i) % 4)  # noqa: E731
    joined = groups.leaders[0][groups.position[0][groups.merged[0]]]
    destinations = {int(j) for j in joined}
    for token, mine in zip(groups.merged[0], joined, strict=True):
        distances = {j: math.dist(place(token), place(j)) for j in destinations}
        assert distances[int(mine)] == pytest.approx(min(distances.values()))


def test_importance_is_the_mean_change_by_guidance_on_the_grid():
    memory = RunMemory()
    output = torch.zeros(2, 3, 8, 8)
    output[1, :, :2, :2] = 3.0
    IBTM().finish(output, True, (4, 4), memory)
    wanted = torch.zeros(1, 16)
    wanted[0, 0] = 3.0
    torch.testing.assert_close(memory.get("importance"), wanted)


def test_facility_location_is_best_for_one_and_good_for_more():
    torch.manual_seed(0)
    for n in (4, 8):
        unit = nn.functional.normalize(torch.randn(20, n, 5), dim=-1)
        S = unit @ unit.transpose(1, 2)
        best = S.sum(dim=1).argmax(dim=-1)  # one column stands for all
        assert torch.equal(facility_location(S, 1)[:, 0], best)
        S = S.clamp_min(0)  # the bound is for gains from nothing
        for count in (2, 3):
            combinations = torch.combinations(torch.arange(n), count)
            optimum = S[:, :, combinations].amax(dim=-1).sum(dim=1).amax(dim=-1)
            chosen = facility_location(S, count)
            value = S.gather(2, chosen[:, None].expand(-1, n, -1)).amax(dim=-1).sum(dim=1)
            assert (value >= (1 - 1 / math.e) * optimum - 1e-5).all()
            assert (chosen.diff(dim=-1) > 0).all()


def test_facility_location_never_takes_a_token_twice():
    same = torch.ones(2, 6, 6)
    assert facility_location(same, 6).tolist() == [[0, 1, 2, 3, 4, 5]] * 2


def test_toma_assigns_every_token_wholly_and_tiles_are_permutations():
    merge = ToMA(0.5, scale=5.0).match(torch.randn(2, 24, 8), (4, 6))
    torch.testing.assert_close(merge.weights.sum(dim=2), torch.ones(merge.weights.shape[0], *merge.weights.shape[1::2]))
    assert sorted(merge.order.tolist()) == list(range(24)) == merge.order[merge.back].tolist()
    same = torch.full((2, 24, 3), 0.7)
    torch.testing.assert_close(merge.unmerge(merge.merge(same)), same)
    assert (merge.leaders.diff(dim=1) > 0).all()


def test_toma_with_a_hard_assignment_is_a_mean_over_the_most_alike():
    x = torch.randn(1, 16, 8)
    merge = ToMA(0.5, scale=1e5).match(x, (4, 4))
    unit = nn.functional.normalize(x[0], dim=-1)
    nearest = (unit @ unit[merge.leaders[0]].T).argmax(dim=1)
    for m, row in enumerate(merge.merge(x)[0]):
        torch.testing.assert_close(row, x[0, nearest == m].mean(dim=0), rtol=1e-4, atol=1e-5)


def test_tiles_fit_any_grid():
    assert tiles_of_tokens((5, 6), 4, "cpu").shape == (10, 3)
    assert tiles_of_tokens((2, 4), 2, "cpu").tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_toma_shares_over_blocks_and_steps(monkeypatch):
    calls = []
    original = ToMA.match
    monkeypatch.setattr(ToMA, "match", lambda self, x, grid: calls.append(1) or original(self, x, grid))
    run(make_model(), ToMA(reuse_steps=2))
    assert len(calls) == 3  # steps 0, 2 and 4
    calls.clear()
    run(make_model(), ToMA(reuse_steps=1, reuse_blocks=False))
    assert len(calls) == len(LEVELS) * (LAYERS - 1)


def test_sdtm_follows_its_cosine():
    """Token-reduction spec: rho .3, delta .2 give .5, .470, .383, .253, .1 at quarters of the run."""
    found = [SDTM().ratio_at(p) for p in (0, 0.25, 0.5, 0.75, 1)]
    assert found == pytest.approx([0.5, 0.470, 0.383, 0.253, 0.1], abs=5e-4)


def test_sdtm_is_dense_every_third_step_merges_windows_then_single_tokens():
    _, handle = run(make_model(), SDTM())
    assert [bool(record["kept"]) for record in handle.records] == [False, True, True, False, True]
    structure, detail = handle.records[1], handle.records[4]
    assert structure["sites"][1] == BOTH and detail["sites"][1] == ("mlp",)
    merged = N - structure["kept"][1].shape[1]
    assert merged % 3 == 0 and merged > 0
    windows = torch.arange(N).view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    for kept in structure["kept"].values():
        for row in kept:
            in_window = torch.isin(windows, row).sum(dim=1)
            assert set(in_window.tolist()) <= {1, 4}


def test_sdtm_gives_merged_tokens_a_tenth_of_the_groups_output():
    """With everything equal from step to step but the blend, the output lies on the line between both ends."""
    model = make_model(num_layers=1)
    outputs = {}
    for blend in (0.0, 0.25, 1.0):
        found, _ = run(model, SDTM(blend=blend, full_every=4), levels=(0.95, 0.94))
        outputs[blend] = found
    # One block of one site would be exact; the MLP follows the attention, so only the ends are compared.
    assert torch.equal(outputs[0.0][0], outputs[1.0][0])
    assert not torch.allclose(outputs[0.0][1], outputs[1.0][1])
    dense = model(**make_inputs(4, sigma=0.94))[0]
    near, far = ((outputs[b][1] - dense).norm() for b in (0.0, 1.0))
    assert near < far  # outputs of a step before are nearer than those of neighbours


def test_sdtm_forgets_a_run_that_ended():
    model = make_model()
    with torch.no_grad(), shiva_ext.enable(model, SDTM(), batched_guidance=True) as handle:
        first = [model(**make_inputs(4, sigma=s))[0] for s in LEVELS]
        assert handle.state.memory.bytes > 0
        second = [model(**make_inputs(4, sigma=s))[0] for s in LEVELS]
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        model(**make_inputs(6, sigma=0.1))  # another batch size mid-run


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ToMeSD(1.0), "ratio is 1.0"),
        (lambda: ToMeSD(sites=("norm",)), "sites is"),
        (lambda: ToMeSD(sites=("block", "mlp")), "sites is"),
        (lambda: ToMeSD(sites=()), "sites is"),
        (lambda: ToMeSD(window=1), "window is 1"),
        (lambda: ToMeSD(first_layer=-1), "first_layer is -1"),
        (lambda: ToFu(), "depth is -1"),
        (lambda: ToMA(tile=0), "tile is 0"),
        (lambda: ToMA(scale=0.0), "scale is 0"),
        (lambda: IBTM(similarity="dot"), "similarity is 'dot'"),
        (lambda: IBTM(0.8), "destinations is 0.25"),
        (lambda: IBTM(plain_steps=0), "plain_steps"),
        (lambda: SDTM(0.1), "swing is 0.2"),
        (lambda: SDTM(full_every=0), "full_every"),
    ],
)
def test_wrong_settings_say_so(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_enable_refuses_what_makes_no_sense():
    model = make_model()
    for options in (dict(ratio=0.5), dict(budget=0.5), dict(sigmas=[0.5])):
        with pytest.raises(ValueError, match="ToMeSD has its own"):
            shiva_ext.enable(model, ToMeSD(), **options)
    with pytest.raises(ValueError, match="reconstruct is for selectors"):
        shiva_ext.enable(model, ToMeSD(), reconstruct="last")
    with pytest.raises(ValueError, match="reconstruct is 'zero'"):
        shiva_ext.enable(model, ToMeSD(), reconstruct="zero")
    assert not any(hasattr(m, "_diffusers_hook") for m in model.modules())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_merges_whole_blocks_or_says_why_not(name):
    family = FAMILIES[name]
    torch.manual_seed(0)
    model = family.build(**next(iter(family.configs.values())))
    arguments = family.inputs(model, 2, 0.7)
    dense = model(**arguments)[0]
    method = ToMeSD(0.5, sites=("block",))
    with torch.no_grad():
        try:
            with shiva_ext.enable(model, method, batched_guidance=False):
                merged = model(**arguments)[0]
        except TypeError as error:
            assert "not for it" in str(error)
            return
        assert merged.shape == dense.shape and torch.isfinite(merged).all() and not torch.equal(merged, dense)
        try:
            with shiva_ext.enable(model, ToMeSD(0.5), batched_guidance=False):
                model(**arguments)
        except ValueError as error:
            assert "sites=('block',)" in str(error)
    torch.testing.assert_close(model(**arguments)[0], dense, rtol=0, atol=0)


@pytest.mark.parametrize("method", EVERY, ids=ident)
def test_a_pipeline_runs_with_it(method):
    pipe = make_pipeline(make_model())
    call = dict(
        prompt_embeds=torch.randn(1, 3, 16),
        negative_prompt_embeds=torch.randn(1, 3, 16),
        pooled_prompt_embeds=torch.randn(1, 24),
        negative_pooled_prompt_embeds=torch.randn(1, 24),
        num_inference_steps=5,
        guidance_scale=3.0,
        output_type="latent",
    )

    def image():
        return pipe(**call, generator=torch.Generator().manual_seed(0)).images

    dense = image()
    with shiva_ext.enable(pipe, method):
        first, second = image(), image()
    assert torch.equal(first, second) and not torch.equal(first, dense)
    assert torch.equal(image(), dense)


def test_fixed_destinations_compile_into_one_graph():
    torch._dynamo.reset()
    model = make_model()
    method = ToMeSD(0.5, random=False, sites=("block",))
    with torch.no_grad(), shiva_ext.enable(model, method, batched_guidance=True) as handle:
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for sigma in (0.9, 0.5):
            handle.at(sigma)
            inputs = make_inputs(4, sigma=sigma)
            torch.testing.assert_close(compiled(**inputs)[0], model(**inputs)[0])


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [(SDTM(), {}, "SDTM carries"), (RandomSelector(0.5), {"reconstruct": "last"}, "reconstruct='last' carries")],
)
def test_what_has_a_state_refuses_to_be_compiled(source, options, message):
    model = make_model()
    with torch.no_grad(), shiva_ext.enable(model, source, batched_guidance=False, **options) as handle:
        handle.at(0.9)
        with pytest.raises(Exception, match=message):
            torch.compile(model, fullgraph=True, backend="eager")(**make_inputs(4, sigma=0.9))


def test_summary_says_that_blocks_merge():
    model = make_model()
    with shiva_ext.enable(model, ToMA()):
        summary = shiva_ext.summary(model)
    assert set(summary.wrapped.values()) == {"ToMA merges its tokens"} and "0 pruned blocks run fused" in str(summary)


def test_width_of_the_tiny_model_is_what_flops_are_counted_for():
    assert ToMeSD(0.5).matching_flops(N, WIDTH) == 2 * N * (N // 4) * WIDTH
