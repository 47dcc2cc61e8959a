"""What torch asks of an op: schema, fake kernel, autograd registration (opcheck); torch.compile without breaks."""

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from shiva_ext import ops

from .cases import DIFFERENTIABLE, EPS, INDEXED, KAPPA, OPS, TAU, Maker, Size, floating, native, tuple_of, wide
from .matrix import same_bits

SAMPLES = {
    "usual": Size(B=2, N=9, k=4, D=6, H=5),
    "keep none": Size(B=2, N=9, k=0, D=6, H=5),
    "empty batch": Size(B=0, N=9, k=4, D=6, H=5),
}
BACKWARD = {
    "soft_rank_backward": lambda m: (m.floats(m.N, dtype=wide(m.dtype)), m.scores(), TAU),
    "token_gather_backward": lambda m: (m.floats(m.k, m.D), m.index(), m.N, False),
    "token_gather_backward of a table": lambda m: (m.floats(m.k, m.D), m.index(), m.N, True),
    "token_scatter_backward": lambda m: (m.tokens(), m.index()),
    "residual_gate_backward": lambda m: (m.floats(m.k, m.D), m.tokens(), m.tokens(), m.index()),
    "counterfactual_scatter_backward": lambda m: (
        m.tokens(),
        m.tokens(),
        m.index(),
        m.floats(m.k, m.D),
        m.tokens(),
        KAPPA,
    ),
    "router_score_backward": lambda m: (
        m.floats(m.N, dtype=wide(m.dtype)),
        *OPS["router_score"].arguments(m).values(),
    ),
    "gather_modulate_backward": lambda m: (m.floats(m.k, m.D), m.tokens(), m.index(), m.floats(m.D), EPS),
    "scatter_residual_backward": lambda m: (m.tokens(), m.index(), m.floats(m.k, m.D), m.floats(m.D)),
    "expert_dispatch_backward": lambda m: (m.expert_rows(), m.place()),
    "expert_combine_backward": lambda m: (
        m.list_of_tokens(),
        m.expert_rows(),
        m.place(),
        m.expert_weight(),
    ),
    "ema_scan_backward": lambda m: (m.tokens(), m.tokens(), m.restarts(), m.tokens()),
    "scatter_mean_backward": lambda m: (m.floats(m.num_groups, m.D), m.groups()),
}


@pytest.mark.parametrize("key", OPS)
def test_opcheck(key):
    op = OPS[key]
    for name, size in SAMPLES.items():
        dtype = torch.bfloat16 if name == "usual" else torch.float32
        arguments, _ = op.split(op.arguments(Maker(size, dtype)))
        torch.library.opcheck(native(op).default, tuple(arguments.values()))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("key", OPS)
def test_opcheck_of_strided_inputs(key, layout):
    op = OPS[key]
    arguments, _ = op.split(op.arguments(Maker(SAMPLES["usual"], torch.float32, layout=layout)))
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(native(op).default, tuple(arguments.values()), test_utils=utilities)


@pytest.mark.parametrize("key", BACKWARD)
def test_opcheck_of_the_backward_op(key):
    backward = getattr(torch.ops.shiva, key.split()[0]).default
    for size in (SAMPLES["usual"], SAMPLES["empty batch"]):
        torch.library.opcheck(backward, BACKWARD[key](Maker(size, torch.float32)))


@pytest.mark.parametrize("name", ["usual", "keep none"])
def test_opcheck_of_the_in_place_op(name):
    m = Maker(SAMPLES[name], torch.float32)
    torch.library.opcheck(torch.ops.shiva.token_scatter_.default, (m.tokens(), m.index(), m.floats(m.k, m.D)))


def test_every_op_has_an_opcheck():
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("shiva::")}
    checked = {op.name for op in OPS.values()} | {key.split()[0] for key in BACKWARD} | {"token_scatter_"}
    checked |= {"router_score_and_projection"}  # in test_router_projection.py
    assert registered == {f"shiva::{name}" for name in checked}


# Every letter changes from call to call. None is 0 or 1, nor is k equal to N: torch.compile has extra graphs for these.
SHAPES = (Size(2, 16, 5, 8, 6), Size(3, 33, 20, 24, 10), Size(4, 64, 31, 12, 7), Size(5, 21, 9, 40, 32))


@pytest.mark.parametrize("key", OPS)
def test_compile_has_one_graph_and_at_most_one_recompile(key):
    op = OPS[key]
    wrapper = getattr(ops, op.name)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: wrapper(*a), fullgraph=True, dynamic=True, backend=counter)
    for size in SHAPES:
        results = []
        for function in (wrapper, compiled):
            arguments, leaves = op.split(op.arguments(Maker(size, torch.float32)))
            outputs = tuple_of(function(*arguments.values()))
            gradients = torch.autograd.grad([out.sum() for out in floating(outputs)], leaves) if leaves else ()
            results.append([*outputs, *gradients])
        assert all(same_bits(a, b) for a, b in zip(*results, strict=True)), size
    assert counter.frame_count <= 2


def test_compiled_in_place_op_changes_its_argument():
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: ops.token_scatter_(*a), fullgraph=True, dynamic=True, backend="aot_eager")
    for size in SHAPES:
        m = Maker(size, torch.float32)
        base, index, src = m.tokens(), m.index(), m.floats(m.k, m.D)
        expected = ops.token_scatter(base, index, src)
        compiled(base, index, src)
        assert same_bits(base, expected)


def pruned_block(x, context, w_in, w_norm, shift, scale, gate, k):
    """Router, selection, modulation and residual as a pruned block chains them."""
    scores = ops.router_score(x, context, w_in, w_norm, w_norm, w_norm, EPS)
    kept, _ = ops.topk_select(scores, k)
    inclusion = torch.sigmoid((k - ops.soft_rank(scores, TAU)) / x.shape[1])
    selected, base = ops.residual_gate(x, inclusion, kept)
    update = torch.tanh(ops.gather_modulate(x, kept, shift, scale, EPS)) + selected
    return ops.token_scatter(ops.scatter_residual(base, kept, update, gate), kept[:, :1], selected[:, :1])


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_inductor_compiles_a_pruned_block(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # a process killed in a compilation leaves half a file
    m = Maker(SHAPES[1], torch.float32)
    tensors = (
        m.tokens(),
        m.floats(m.H),
        m.weight(m.H, m.D),
        m.weight(m.H),
        m.floats(m.D),
        m.floats(m.D),
        m.floats(m.D),
    )
    torch._dynamo.reset()
    compiled = torch.compile(pruned_block, fullgraph=True, dynamic=True)
    results = []
    for function in (pruned_block, compiled):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = function(*leaves, m.k)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("key", DIFFERENTIABLE)
def test_backward_under_fake_tensors_has_the_shapes_and_dtypes_of_the_real_one(key):
    op = OPS[key]
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        arguments = {
            name: mode.from_tensor(a) if torch.is_tensor(a) else a
            for name, a in op.arguments(Maker(SAMPLES["usual"], torch.bfloat16)).items()
        }
        ready, leaves = op.split(arguments)
        outputs = tuple_of(native(op)(*ready.values()))
        for grad, leaf in zip(torch.autograd.grad([o.sum() for o in floating(outputs)], leaves), leaves, strict=True):
            assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)


@pytest.mark.parametrize("key", INDEXED)
def test_meta_tensors_give_meta_outputs(key):
    op = OPS[key]
    arguments = op.arguments(Maker(SAMPLES["usual"], torch.float16))
    meta = {name: a.to("meta") if torch.is_tensor(a) else a for name, a in arguments.items()}
    real, fake = tuple_of(native(op)(*arguments.values())), tuple_of(native(op)(*meta.values()))
    assert [(t.shape, t.dtype) for t in real] == [(t.shape, t.dtype) for t in fake]
    assert all(t.device.type == "meta" for t in fake)
