"""The methods on a tiny SD3: what each must hold to, and what it refuses."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchHeunDiscreteScheduler
from models import test_flux as flux
from models import test_pixart as pixart
from models.families import FAMILIES
from models.tiny import LAYERS, N, make_inputs, make_model, make_pipeline
from torch import nn

import shiva_ext
from shiva_ext.methods import IBTM, METHODS, SDTM, ToFu, ToMA, ToMeSD
from shiva_ext.methods.memory import RunMemory
from shiva_ext.methods.partition import best_destination, partition
from shiva_ext.methods.toma import tiles_of_tokens
from shiva_ext.selection import RandomSelector
from shiva_ext.selection.baselines import hash_rows

pytestmark = pytest.mark.usefixtures("one_thread")
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
CALL = dict(
    prompt_embeds=torch.linspace(-1, 1, 48).view(1, 3, 16),
    negative_prompt_embeds=torch.zeros(1, 3, 16),
    pooled_prompt_embeds=torch.linspace(-1, 1, 24).view(1, 24),
    negative_pooled_prompt_embeds=torch.zeros(1, 24),
    num_inference_steps=5,
    guidance_scale=3.0,
    output_type="latent",
)


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
    assert method.tokens(2, N, 3, 8) == (attention, mlp) and method.tokens(0, N, 3, 8) == (N, N)
    assert summary.flop_speedup > 1 and summary.kept[0][0] == N and summary.kept[0][2] == 8


def test_whole_blocks_add_what_they_add_to_merged_tokens():
    """x + unmerge(block(m) - m), by hand, on the only block that merges."""
    model, method = make_model(num_layers=2), ToMA(0.5, scale=20.0)
    first, second = model.transformer_blocks
    seen = {}

    def look(name, module):
        return module.register_forward_hook(
            lambda m, args, kwargs, output: seen.update({name: (kwargs, output[1])}), with_kwargs=True
        )

    with torch.no_grad(), shiva_ext.enable(model, method, batched_guidance=False):
        handles = [look("first", first), look("second", second)]
        model(**make_inputs(2))
        for handle in handles:
            handle.remove()
    (_, x), (arguments, found) = seen["first"], seen["second"]
    merge = method.match(x, (4, 4))
    merged = merge.merge(x)
    with torch.no_grad():
        _, processed = second(**{**arguments, "hidden_states": merged})
    torch.testing.assert_close(found, x + merge.unmerge(processed - merged))
    assert merged.shape[1] == N // 2


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


def test_tiles_and_their_rest_are_all_tokens():
    tiles, rest = tiles_of_tokens((2, 4), 2, "cpu")
    assert tiles.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]] and rest.tolist() == []
    for grid in ((5, 6), (3, 9), (7, 7), (37, 53)):
        tiles, rest = tiles_of_tokens(grid, 4, "cpu")
        assert sorted([*tiles.flatten().tolist(), *rest.tolist()]) == list(range(grid[0] * grid[1]))
        assert tiles.shape[1] == min(4, grid[0]) * min(4, grid[1])


@pytest.mark.parametrize("grid", [(5, 5), (5, 7), (3, 10)])
def test_toma_leaves_what_fills_no_tile(grid):
    N_, x = grid[0] * grid[1], torch.randn(2, grid[0] * grid[1], 8)
    merge = ToMA(0.5, scale=1e4).match(x, grid)
    tiles, rest = tiles_of_tokens(grid, 4, "cpu")
    assert merge.leaders.shape[1] == tiles.numel() // 2 + len(rest) < N_
    back = merge.unmerge(merge.merge(x))
    torch.testing.assert_close(back[:, rest], x[:, rest])
    same = torch.full_like(x, 0.3)
    torch.testing.assert_close(merge.unmerge(merge.merge(same)), same)


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


@pytest.mark.parametrize("dual", [(), (0,)])
def test_sdtm_gives_merged_tokens_a_tenth_of_the_groups_output(dual):
    """Of each module by itself: what comes out is .1 of the group's and .9 of the token's own of the full step."""
    model = make_model(num_layers=1, dual_attention_layers=dual, qk_norm="rms_norm")
    block = model.transformer_blocks[0]
    modules = [block.attn, block.ff] + ([block.attn2] if dual else [])
    with torch.no_grad(), shiva_ext.enable(model, SDTM(blend=0.1), batched_guidance=True) as handle:
        handle.record()
        seen = {module: [] for module in modules}
        hooks = [m.register_forward_hook(lambda m, args, out: seen[m].append(out)) for m in modules]
        model(**make_inputs(4, sigma=0.95))
        inner = {}
        for module in modules:  # below our hook: what the module itself gives on merged tokens
            original = module._diffusers_hook.get_hook("shiva_ext").fn_ref.original_forward
            module._diffusers_hook.get_hook("shiva_ext").fn_ref.original_forward = _keeping(original, inner, module)
        model(**make_inputs(4, sigma=0.94))
        for hook in hooks:
            hook.remove()
        leaders = handle.records[1]["kept"][0]
    merged = torch.ones(4, N, dtype=torch.bool).scatter(1, leaders, False)
    for module in modules:
        full, now = (out[0] if isinstance(out, tuple) else out for out in seen[module])
        rest = now[merged] - 0.9 * full[merged]  # a tenth of some group's output
        tenth = 0.1 * inner[module].flatten(0, 1)
        assert ((rest[:, None] - tenth[None]).abs().amax(-1).amin(1) < 1e-4).all()
        assert torch.equal(now[~merged], inner[module].flatten(0, 1))


def _keeping(forward, inner, module):
    def kept(*args, **kwargs):
        output = forward(*args, **kwargs)
        inner[module] = output[0] if isinstance(output, tuple) else output
        return output

    return kept


def test_sdtm_takes_the_windows_that_are_alike_and_those_long_merged():
    x = torch.randn(1, 16, 8)
    windows = torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    x[:, windows[2]] = x[:, windows[2][:1]] + 0.01 * torch.randn(1, 4, 8)
    call = SimpleNamespace(x=x, layer=0, sigma=0.9)
    groups = SDTM()._structure(call, windows, torch.zeros(1, 16), 3)
    assert set(groups.merged[0].tolist()) < set(windows[2].tolist())
    same = SimpleNamespace(x=torch.ones(1, 16, 8), layer=0, sigma=0.9)
    age = torch.zeros(1, 16)
    age[:, windows[3]] = 5
    groups = SDTM()._structure(same, windows, age, 3)
    assert set(groups.merged[0].tolist()) < set(windows[3].tolist())


def test_constant_importance_reduces_ibtm_to_random_destinations():
    """With everything in the pool, and all equally important, it is ToMe with random destinations."""
    x = torch.randn(2, N, 8)
    found = IBTM(0.5, pool=10.0, similarity="cosine").match(x, torch.ones(1, N), 8, (4, 4), key=11)
    drawn = hash_rows(N, [11], x.device).float()
    destinations = drawn.topk(4).indices.sort().values.expand(2, -1)
    wanted = partition(*best_destination(x, destinations), 8)
    assert torch.equal(found.leaders, wanted.leaders) and torch.equal(found.position, wanted.position)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchHeunDiscreteScheduler])
def test_a_pipelines_progress_is_that_of_its_steps(scheduler):
    """Also for schedulers that count no steps, or evaluate a level twice: SDTM reaches its detail stage."""
    model = make_model()
    pipe = make_pipeline(model)
    options = {} if scheduler is FlowMatchHeunDiscreteScheduler else dict(num_train_timesteps=1000)
    pipe.scheduler = scheduler(**options)
    with torch.no_grad(), shiva_ext.enable(pipe, SDTM()) as handle:
        handle.record()
        seen = []
        pipe.scheduler.set_timesteps(10)
        for timestep in pipe.scheduler.timesteps:
            model(**make_inputs(4, sigma=float(timestep) / 1000))
            seen.append(handle.records[-1])
    stages = [set(record["sites"].values()) for record in seen]
    assert {BOTH} in stages and {("mlp",)} in stages
    assert stages.index({BOTH}) < stages.index({("mlp",)})


def test_skip_layer_guidance_leaves_the_memory_of_the_run():
    """Its call has another batch and comes at the same level."""
    model = make_model()
    pipe = make_pipeline(model)
    kept = []
    for sigmas_with_skips in (False, True):
        with torch.no_grad(), shiva_ext.enable(pipe, IBTM(), batched_guidance=True) as handle:
            handle.record()
            for sigma in LEVELS:
                model(**make_inputs(4, sigma=sigma))
                if sigmas_with_skips:
                    model(**make_inputs(2, sigma=sigma), skip_layers=[1])
        kept.append([r["kept"] for r in handle.records if all(len(i) == 4 for i in r["kept"].values())])
    plain, skipping = [[k[1].tolist() for k in run if k] for run in kept]
    assert plain == skipping and len(plain) == 3


def test_an_odd_batch_of_guidance_is_refused():
    model = make_model()
    with shiva_ext.enable(model, IBTM(), batched_guidance=True), pytest.raises(ValueError, match="3 samples"):
        model(**make_inputs(3))


def test_nothing_is_held_after_a_pipelines_last_step():
    pipe = make_pipeline(make_model())
    with shiva_ext.enable(pipe, SDTM()) as handle:
        pipe(**CALL, generator=torch.Generator().manual_seed(0))
        assert handle.state.memory.bytes == 0


@pytest.mark.parametrize("method", [SDTM(), IBTM(plain_steps=3), ToMeSD(0.25), ToMA()], ids=ident)
def test_summary_says_what_a_run_does(method):
    model, steps = make_model(), 9
    levels = [1 - i / steps for i in range(steps)]
    _, handle = run(model, method, levels)
    with shiva_ext.enable(model, method, batched_guidance=True):
        summary = shiva_ext.summary(model, steps=levels)
    for record, row in zip(handle.records, summary.kept, strict=True):
        assert [record["kept"][layer].shape[1] if layer in record["kept"] else N for layer in range(LAYERS)] == list(
            row
        )


def test_matching_sees_small_differences_in_half_precision():
    """Tokens that differ by less than bfloat16 tells in a cosine: what is merged must not follow their order."""
    torch.manual_seed(0)
    x = (torch.ones(1, 1024, 64) + 0.05 * torch.randn(1, 1024, 64)).bfloat16()
    call = SimpleNamespace(x=x, grid=(32, 32), layer=0, sigma=0.5)
    groups = ToMeSD(0.3).match(call)
    assert 0.4 < (groups.merged < 512).float().mean() < 0.6


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
        (lambda: IBTM(plain_steps=0), "plain_steps is 0"),
        (lambda: IBTM(pool=0.0), "pool is 0"),
        (lambda: IBTM(first_layer=7, last_layer=3), "last_layer is 3, before first_layer 7"),
        (lambda: SDTM(blend=2.0), "blend is 2"),
        (lambda: SDTM(0.1), "swing is 0.2"),
        (lambda: SDTM(full_every=0), "full_every is 0"),
    ],
)
def test_wrong_settings_say_so(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_enable_refuses_what_makes_no_sense():
    model = make_model()
    for options in (dict(ratio=0.5), dict(budget=0.5), dict(sigmas=[0.5]), dict(tile=4)):
        with pytest.raises(ValueError, match="ToMeSD has its own"):
            shiva_ext.enable(model, ToMeSD(), **options)
    with pytest.raises(ValueError, match="reconstruct is for selectors"):
        shiva_ext.enable(model, ToMeSD(), reconstruct="last")
    with pytest.raises(ValueError, match="reconstruct is 'zero'"):
        shiva_ext.enable(model, ToMeSD(), reconstruct="zero")
    assert not any(hasattr(m, "_diffusers_hook") for m in model.modules())


MERGING = {"dit": True, "sana": False}  # whether attention and MLP by themselves can merge, too


@torch.no_grad()
def check_family(model, arguments, modules: bool):
    dense = model(**arguments)[0]
    for method in (ToMeSD(0.5, sites=("block",)), ToMA(0.5)):
        with shiva_ext.enable(model, method, batched_guidance=False) as handle:
            handle.record()
            merged = model(**arguments)[0]
        assert merged.shape == dense.shape and torch.isfinite(merged).all() and not torch.equal(merged, dense)
        assert all(record["kept"] for record in handle.records)
    if modules:
        with shiva_ext.enable(model, ToMeSD(0.5), batched_guidance=False):
            assert not torch.equal(model(**arguments)[0], dense)
    else:
        for method, advice in ((ToMeSD(0.5), r"sites=\('block',\)"), (SDTM(), "use another method")):
            with pytest.raises(ValueError, match=advice):
                shiva_ext.enable(model, method)
    assert torch.equal(model(**arguments)[0], dense)


@pytest.mark.parametrize("name", MERGING)
def test_families_with_a_grid_merge(name):
    family = FAMILIES[name]
    torch.manual_seed(0)
    model = family.build(**next(iter(family.configs.values())))
    check_family(model, family.inputs(model, 2, 0.7), MERGING[name])


def test_pixart_merges():
    check_family(pixart.make_model(), pixart.make_inputs(2), True)


def test_flux_merges_and_refuses_what_is_not_one_picture():
    model = flux.make_model()
    arguments = flux.make_inputs(model, 1)
    check_family(model, arguments, False)
    arguments["img_ids"] = arguments["img_ids"].clone()
    arguments["img_ids"][0, 1] = 40
    with shiva_ext.enable(model, ToMA(0.5)), pytest.raises(TypeError, match="not one picture"), torch.no_grad():
        model(**arguments)


@pytest.mark.parametrize("name", ["qwenimage", "wan"])
def test_families_without_a_grid_are_refused_in_words(name):
    family = FAMILIES[name]
    torch.manual_seed(0)
    model = family.build(**next(iter(family.configs.values())))
    with shiva_ext.enable(model, ToMA(0.5)), pytest.raises(TypeError, match="not for it"), torch.no_grad():
        model(**family.inputs(model, 2, 0.7))


@pytest.mark.parametrize("method", EVERY, ids=ident)
def test_a_pipeline_runs_with_it(method):
    pipe = make_pipeline(make_model())

    def image():
        return pipe(**CALL, generator=torch.Generator().manual_seed(0)).images

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
