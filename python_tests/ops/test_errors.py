"""Each bad argument gets an error that names the op and the argument, through the wrappers and through the raw ops."""

import math
import re

import pytest
import torch

from shiva_ext import ops

from . import simulated
from .cases import OPS, TYPICAL, Maker
from .device import DEVICE, place

TENSORS = {
    "topk_select": ("scores",),
    "soft_rank": ("scores",),
    "token_gather": ("x", "index"),
    "token_scatter": ("base", "index", "src"),
    "token_scatter_": ("base", "index", "src"),
    "residual_gate": ("x", "inclusion", "kept"),
    "counterfactual_scatter": ("base", "kept", "src", "inclusion", "update"),
    "router_score": ("x", "context", "w_in", "ln_weight", "ln_bias", "w_out"),
    "gather_modulate": ("x", "index", "shift", "scale"),
    "scatter_residual": ("base", "index", "update", "gate"),
    "scatter_mean": ("x", "position"),
    "facility_location": ("similarity",),
    "expert_dispatch": ("x", "experts"),
    "expert_combine": ("rows", "place", "weight"),
    "ema_scan": ("x", "p"),
}
INDICES = ("index", "kept", "position", "experts", "place")
ARGUMENTS = [(op, name) for op, names in TENSORS.items() for name in names]
FLOATING = [(op, name) for op, name in ARGUMENTS if name not in INDICES]
INDEXES = [(op, name) for op, name in ARGUMENTS if name in INDICES]

# op, argument, dimension: one element less there contradicts the other arguments.
MISMATCHES = [
    ("token_gather", "index", 0),
    *[(op, "index", d) for op in ("token_scatter", "token_scatter_", "scatter_residual") for d in (0, 1)],
    *[(op, "src", d) for op in ("token_scatter", "token_scatter_", "counterfactual_scatter") for d in (0, 1, 2)],
    *[("residual_gate", "inclusion", d) for d in (0, 1)],
    ("residual_gate", "kept", 0),
    *[("counterfactual_scatter", "kept", d) for d in (0, 1)],
    *[("counterfactual_scatter", "inclusion", d) for d in (0, 1)],
    *[("counterfactual_scatter", "update", d) for d in (0, 1, 2)],
    *[("router_score", name, d) for name in ("context", "w_in") for d in (0, 1)],
    *[("router_score", name, 0) for name in ("ln_weight", "ln_bias", "w_out")],
    ("gather_modulate", "index", 0),
    *[("gather_modulate", name, d) for name in ("shift", "scale") for d in (0, 1)],
    *[("scatter_residual", "update", d) for d in (0, 1, 2)],
    *[("scatter_residual", "gate", d) for d in (0, 1)],
    *[("scatter_mean", "position", d) for d in (0, 1)],
    *[("facility_location", "similarity", d) for d in (1, 2)],
    *[("ema_scan", "p", d) for d in (0, 1)],
    ("expert_dispatch", "experts", 0),
    *[("expert_combine", name, d) for name in ("place", "weight") for d in (0, 1)],
]
# op, argument: it must have the dtype of the op's first tensor. (The router's small vectors may be float32 instead.)
SAME_DTYPE = [
    ("token_scatter", "src"),
    ("token_scatter_", "src"),
    ("counterfactual_scatter", "src"),
    ("counterfactual_scatter", "update"),
    ("router_score", "w_in"),
    ("gather_modulate", "shift"),
    ("gather_modulate", "scale"),
    ("scatter_residual", "update"),
    ("scatter_residual", "gate"),
]


def arguments_of(op: str, dtype: torch.dtype = torch.float32) -> dict:
    return OPS[op.rstrip("_")].arguments(Maker(TYPICAL, dtype))


def assert_refused(api: str, op: str, arguments: dict, names: tuple[str, ...], *hints: str) -> None:
    """The call raises, and its message names the op, one of the arguments, and every hint."""
    function = getattr(ops if api == "wrapper" else torch.ops.shiva, op)
    with pytest.raises((RuntimeError, ValueError)) as caught:
        function(*arguments.values())
    message = str(caught.value).splitlines()[0]
    assert re.search(rf"\b{op}: ", message), message
    assert any(re.search(rf"\b{name}\b", message) for name in names), message
    for hint in hints:
        assert re.search(hint, message), f"no {hint!r} in: {message}"


both = pytest.mark.parametrize("api", ["wrapper", "raw"])


@both
@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_a_wrong_rank_is_refused(op, name, api):
    for change in (lambda t: t.unsqueeze(0).unsqueeze(0), lambda t: t.flatten()[0]):
        arguments = arguments_of(op)
        arguments[name] = change(arguments[name])
        assert_refused(api, op, arguments, (name,), re.escape(str(list(arguments[name].shape))))


@both
@pytest.mark.parametrize("k", [-1, TYPICAL.N + 1])
def test_a_k_outside_0_to_N_is_refused(k, api):
    arguments = arguments_of("topk_select") | {"k": k}
    assert_refused(api, "topk_select", arguments, ("k",), str(k), str(TYPICAL.N))


@both
@pytest.mark.parametrize("count", [-1, TYPICAL.N + 1])
def test_a_count_outside_0_to_n_is_refused(count, api):
    arguments = arguments_of("facility_location") | {"count": count}
    assert_refused(api, "facility_location", arguments, ("count",), str(count), str(TYPICAL.N))


@both
@pytest.mark.parametrize(("op", "name", "dim"), MISMATCHES)
def test_mismatched_shapes_are_refused(op, name, dim, api):
    arguments = arguments_of(op)
    size = arguments[name].shape[dim]
    arguments[name] = arguments[name].narrow(dim, 0, size - 1).contiguous()
    tensors = tuple(n for n, a in arguments.items() if torch.is_tensor(a))
    assert_refused(api, op, arguments, tensors, rf"\b{size - 1}\b", rf"\b{size}\b")


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize(("op", "name"), INDEXES)
def test_an_index_of_another_dtype_is_refused(op, name, dtype, api):
    arguments = arguments_of(op)
    arguments[name] = arguments[name].to(dtype)
    assert_refused(api, op, arguments, (name,), "int64")


@both
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("bad", [-1, TYPICAL.N, 2**31 - 1])
@pytest.mark.parametrize(("op", "name"), [case for case in INDEXES if case[1] != "place"])
def test_an_index_out_of_range_is_refused(op, name, bad, index_dtype, api):
    arguments = arguments_of(op)
    arguments[name] = arguments[name].to(index_dtype)
    arguments[name][-1, -1] = bad
    end = arguments.get("num_groups") or arguments.get("num_experts") or TYPICAL.N
    assert_refused(api, op, arguments, (name,), str(bad), str(end))


@both
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("past", [None, 0, 7])
def test_a_place_out_of_range_is_refused(past, index_dtype, api):
    arguments = arguments_of("expert_combine")
    R = len(arguments["rows"])
    bad = -2 if past is None else R + past
    arguments["place"] = arguments["place"].to(index_dtype)
    arguments["place"][2, 1] = bad
    assert_refused(api, "expert_combine", arguments, ("place",), rf"\[-1, {R}\), got {bad} in row 2, column 1")


def test_places_of_no_rows_are_all_minus_one():
    weight = ones(2, 3)
    none = place(torch.full((2, 3), -1))
    assert not torch.ops.shiva.expert_combine(ones(0, 4), none, weight).any()
    with pytest.raises(RuntimeError, match=r"expert_combine: place must lie in \[-1, 0\), got 0 in row 1"):
        torch.ops.shiva.expert_combine(ones(0, 4), place(torch.tensor([[-1, -1, -1], [0, -1, -1]])), weight)


@pytest.mark.skipif(DEVICE.type != "cpu" or bool(simulated.VARIANT), reason="a GPU would have to wait")
def test_the_backward_refuses_a_row_of_two_choices():
    doubled = torch.tensor([[0, 3], [-1, 3]])
    with pytest.raises(RuntimeError, match=r"expert_combine_backward: place names row 3 twice, in rows 0 and 1"):
        torch.ops.shiva.expert_combine_backward(torch.ones(2, 4), torch.ones(5, 4), doubled, torch.ones(2, 2))


WRITING = [
    ("token_scatter", "index", None),
    ("token_scatter_", "index", None),
    ("residual_gate", "kept", None),
    ("counterfactual_scatter", "kept", None),
    ("scatter_residual", "index", None),
    ("token_gather", "index", "x"),
    ("gather_modulate", "index", "x"),
]


@pytest.mark.skipif(DEVICE.type != "cpu" or bool(simulated.VARIANT), reason="a GPU would have to wait")
@both
@pytest.mark.parametrize(("op", "name", "differentiated"), WRITING)
def test_a_token_that_a_row_names_twice_is_refused_where_rows_are_written(op, name, differentiated, api):
    """Forward, but for the ops that only read there: backward. What an op writes in place is not touched."""
    arguments = arguments_of(op)
    index = arguments[name]
    index[1, -1] = index[1, 0]
    before = {key: value.clone() for key, value in arguments.items() if isinstance(value, torch.Tensor)}
    said = rf"{op}\w*: the index names token {index[1, 0]} of row 1 twice, in columns 0 and {index.shape[1] - 1}"
    with pytest.raises(RuntimeError, match=said):
        function = getattr(ops if api == "wrapper" else torch.ops.shiva, op)
        if differentiated is None:
            function(*arguments.values())
        else:
            arguments[differentiated].requires_grad_()
            function(*arguments.values()).sum().backward()
    assert all(torch.equal(arguments[key].detach(), value) for key, value in before.items())


@both
@pytest.mark.parametrize("count", [-1, 0, 1025])
def test_a_number_of_experts_outside_1_to_1024_is_refused(count, api):
    arguments = arguments_of("expert_dispatch") | {"num_experts": count}
    assert_refused(api, "expert_dispatch", arguments, ("num_experts",), rf"\[1, 1024\], got {count}")


def test_a_wrong_capacity_is_refused():
    arguments = arguments_of("expert_dispatch")
    for capacity in (-1, 0):
        assert_refused("wrapper", "expert_dispatch", arguments | {"capacity": capacity}, ("capacity",), f"{capacity}")
    assert_refused("raw", "expert_dispatch", arguments | {"capacity": -1}, ("capacity",), "negative, got -1")
    huge = arguments | {"capacity": 2**30}
    assert_refused("raw", "expert_dispatch", huge, ("capacity",), r"at most 2\^31 - 2")


@pytest.mark.parametrize(("op", "name"), [case for case in INDEXES if case[1] not in ("position", "experts", "place")])
def test_an_index_into_no_tokens_is_refused(op, name):
    arguments = arguments_of(op)
    empty = {n: a[:, :0] for n, a in arguments.items() if n in ("x", "base", "inclusion", "update") and a.dim() > 1}
    if op == "scatter_residual":
        del empty["update"]  # [B, k, D] there
    assert_refused("raw", op, arguments | empty, (name,), "no tokens")


@both
def test_a_position_past_the_last_group_is_refused(api):
    arguments = arguments_of("scatter_mean")
    M = arguments["num_groups"]
    arguments["position"][0, 3] = M
    assert_refused(api, "scatter_mean", arguments, ("position",), rf"\[0, {M}\), got {M} in row 0, column 3")


@both
@pytest.mark.parametrize(("M", "said"), [(-1, "num_groups must not be negative, got -1"), (0, "there are no groups")])
def test_a_wrong_number_of_groups_is_refused(M, said, api):
    arguments = arguments_of("scatter_mean") | {"num_groups": M}
    assert_refused(api, "scatter_mean", arguments, ("num_groups", "position"), said)


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, device=DEVICE)


@pytest.mark.parametrize(
    "call",
    [
        lambda index: torch.ops.shiva.token_gather_backward(ones(1, 2, 3), index, 5, False),
        lambda index: torch.ops.shiva.token_scatter_backward(ones(1, 5, 3), index),
        lambda index: torch.ops.shiva.scatter_residual_backward(ones(1, 5, 3), index, ones(1, 2, 3), ones(1, 3)),
        lambda index: torch.ops.shiva.residual_gate_backward(ones(1, 2, 3), ones(1, 5, 3), ones(1, 5, 3), index),
        lambda index: torch.ops.shiva.counterfactual_scatter_backward(
            ones(1, 5, 3), ones(1, 5, 3), index, ones(1, 2, 3), ones(1, 5, 3), 0.5
        ),
        lambda index: torch.ops.shiva.scatter_mean_backward(ones(1, 5, 3), index),
        lambda index: torch.ops.shiva.gather_modulate_backward(ones(1, 2, 3), ones(1, 5, 3), index, ones(1, 3), 1e-6),
        lambda index: torch.ops.shiva.expert_dispatch_backward(ones(5, 3), index - index.eq(-1).long()),
        lambda index: torch.ops.shiva.expert_combine_backward(
            ones(1, 3), ones(5, 3), index - index.eq(-1).long(), ones(1, 2)
        ),
    ],
)
@pytest.mark.parametrize("bad", [-1, 5])
def test_the_backward_ops_refuse_an_index_out_of_range(call, bad):
    with pytest.raises((RuntimeError, ValueError), match=rf"_backward.*(index|kept|position|place).*({bad}|-2)"):
        call(place(torch.tensor([[0, bad]])))


@both
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float8_e4m3fn, torch.bool], ids=str)
@pytest.mark.parametrize(("op", "name"), FLOATING)
def test_an_unsupported_dtype_is_refused(op, name, dtype, api):
    arguments = arguments_of(op)
    arguments[name] = arguments[name].nan_to_num(0, 0, 0).to(dtype)
    assert_refused(api, op, arguments, (name,), r"float")


@both
@pytest.mark.parametrize(("op", "name"), SAME_DTYPE)
def test_mixed_dtypes_are_refused(op, name, api):
    arguments = arguments_of(op)
    arguments[name] = arguments[name].to(torch.bfloat16)
    first = next(iter(arguments))
    assert_refused(api, op, arguments, (name, first), r"(?i)bfloat16", r"(?i)float(32)?\b")


@both
@pytest.mark.parametrize("name", ["context", "ln_weight", "ln_bias", "w_out"])
def test_the_routers_small_vectors_have_the_dtype_of_x_or_float32(name, api):
    for dtype, other in ((torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16)):
        arguments = arguments_of("router_score", dtype)
        arguments[name] = arguments[name].to(other)
        assert_refused(api, "router_score", arguments, (name,), r"(?i)(b?float16|half)")


@both
@pytest.mark.parametrize("op", ["residual_gate", "counterfactual_scatter"])
def test_an_inclusion_in_half_precision_is_refused(op, api):
    arguments = arguments_of(op, torch.bfloat16)
    arguments["inclusion"] = arguments["inclusion"].to(torch.bfloat16)
    assert_refused(api, op, arguments, ("inclusion",), r"(?i)float32")


@both
@pytest.mark.parametrize("kappa", [-1.0, math.nan, math.inf])
def test_a_curvature_that_is_negative_or_not_finite_is_refused(kappa, api):
    arguments = arguments_of("counterfactual_scatter") | {"kappa": kappa}
    assert_refused(api, "counterfactual_scatter", arguments, ("kappa",), f"{kappa:g}")


@both
@pytest.mark.parametrize("tau", [0.0, -0.5, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(tau, api):
    arguments = arguments_of("soft_rank") | {"tau": tau}
    assert_refused(api, "soft_rank", arguments, ("tau",), f"{tau:g}")


@pytest.mark.skipif(DEVICE.type != "cpu", reason="to look at the scores would wait for the device")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_soft_rank_wrapper_refuses_scores_that_are_not_finite(bad):
    scores = torch.tensor([[0.0, bad, 1.0]])
    with pytest.raises(ValueError, match=r"soft_rank.*scores.*finite"):
        ops.soft_rank(scores, 0.1)
    assert torch.ops.shiva.soft_rank(scores, 0.1).shape == (1, 3)


@both
@pytest.mark.parametrize(("op", "name"), [(op, name) for op, name in ARGUMENTS if len(TENSORS[op]) > 1])
def test_a_tensor_on_another_device_is_refused(op, name, api):
    arguments = arguments_of(op)
    arguments[name] = arguments[name].to("meta")
    assert_refused(api, op, arguments, TENSORS[op], "meta", DEVICE.type)
