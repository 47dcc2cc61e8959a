"""torch.export and AOTInductor packages of a pruned step, and proof that none of it waits for a GPU."""

import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import shiva_ext

from .every_family import EVERY
from .tiny import make_artifact, make_inputs, make_model, varying_table


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def small():
    """The model, its handle, and the inputs; three layers, because tracing is what takes the time."""
    model = make_model(num_layers=3)
    handle = shiva_ext.enable(model, make_artifact(varying_table(4, num_layers=3), num_layers=3), batched_guidance=True)
    return model, handle, make_inputs()


def op_names(program) -> set[str]:
    return {
        str(node.target)
        for module in program.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
    }


@torch.no_grad()
def test_a_strict_export_equals_eager(small):
    model, handle, inputs = small
    wanted, names = model(**inputs)[0], list(model.state_dict())
    with handle.at(0.7).exportable() as transformer:
        program = torch.export.export(transformer, (), inputs, strict=True)
    assert list(model.state_dict()) == names
    assert torch.equal(program.module()(**inputs)[0], wanted)
    ops = {f"shiva.{op}.default" for op in ("router_score", "topk_select", "gather_modulate", "scatter_residual")}
    assert ops <= op_names(program)
    assert torch.equal(model(**inputs)[0], wanted)


@torch.no_grad()
def test_an_export_is_of_the_announced_level_and_nothing_else(small):
    model, handle, inputs = small
    programs = []
    for sigma in (0.1, 0.9):
        with handle.at(sigma).exportable() as transformer:
            programs.append(torch.export.export(transformer, (), inputs, strict=True))
        assert torch.equal(programs[-1].module()(**inputs)[0], model(**inputs)[0])
    assert not torch.equal(*(program.module()(**inputs)[0] for program in programs))


def test_an_export_without_a_level_says_what_to_do(small):
    model, handle, _ = small
    with pytest.raises(RuntimeError, match="call handle.at"), handle.exportable():
        pass
    assert not hasattr(model, "shiva_ext_router")


@pytest.mark.skipif(shutil.which("c++") is None, reason="AOTInductor needs a C++ compiler")
@torch.no_grad()
def test_a_package_of_one_step_runs_from_python(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    model = make_model(num_layers=2)
    handle, inputs = shiva_ext.enable(model, make_artifact(0.6, num_layers=2)), make_inputs()
    with handle.at(0.7).exportable() as transformer:
        program = torch.export.export(transformer, (), inputs, strict=True)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "step.pt2"))
    got = torch._inductor.aoti_load_package(path)(**inputs)[0]
    torch.testing.assert_close(got, model(**inputs)[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("most", [1, 2])
def test_graphs_are_as_many_as_sets_of_token_counts(most):
    model, levels = make_model(num_layers=3), (0.05, 0.3, 0.55, 0.8, 1.0)
    source = make_artifact(varying_table(6, num_layers=3), num_layers=3)
    handle = shiva_ext.enable(model, source, budget=0.5, max_distinct_k=most)
    assert len(set(shiva_ext.summary(model, steps=levels).kept)) == most
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
    for run in range(2):
        for sigma in levels:
            handle.at(sigma)
            assert torch.equal(compiled(**make_inputs(sigma=sigma))[0], model(**make_inputs(sigma=sigma))[0])
        assert counter.frame_count == most, run


def on_a_pretended_gpu(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replaces a module's tensors by fake ones on the device type cuda; no GPU is needed for that."""
    with mode, torch.no_grad():
        for part in module.modules():
            for name, p in part._parameters.items():
                if p is not None:
                    fake = torch.empty(p.shape, dtype=p.dtype, device="cuda")
                    part._parameters[name] = nn.Parameter(fake, requires_grad=False)
            for name, b in part._buffers.items():
                if b is not None:
                    part._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device="cuda")
            for name, value in list(vars(part).items()):
                if isinstance(value, torch.Tensor):  # Qwen-Image keeps its positions so
                    setattr(part, name, torch.empty(value.shape, dtype=value.dtype, device="cuda"))


class WithoutGuard(TorchFunctionMode):
    """Says with other ops what asks for CUDA's device guard, which a CPU build of torch lacks: x[...], contiguous()."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.contiguous:
            return args[0] if args[0].is_contiguous() else args[0].clone(memory_format=torch.contiguous_format)
        if func is torch.Tensor.__getitem__:
            return self.index(*args)
        if getattr(func, "__name__", "") == "__setitem__":
            return torch.ops.aten.copy_.default(self.index(*args[:2]), args[2])
        return func(*args, **(kwargs or {}))

    @staticmethod
    def index(x, index):
        index = index if isinstance(index, tuple) else (index,)
        if Ellipsis in index:
            at = index.index(Ellipsis)
            missing = x.ndim - sum(each is not None for each in index) + 1
            index = (*index[:at], *[slice(None)] * missing, *index[at + 1 :])
        dim = 0
        for each in index:
            if each is None:
                x, dim = x.unsqueeze(dim), dim + 1
            elif isinstance(each, int):
                x = x.select(dim, each)
            else:
                x, dim = torch.ops.aten.slice.Tensor(x, dim, each.start, each.stop, each.step or 1), dim + 1
        return x


class NoTransfers(TorchDispatchMode):
    """Raises at every op that copies between devices: from the GPU it waits, to the GPU it cannot be captured."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        flat = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in flat if t.ndim > 0 or t.device.type == "cuda"}
        assert len(devices) <= 1, f"{func} copies between {devices}"
        return result


def on_the_pretended_gpu(inputs: dict, dtype: torch.dtype) -> dict:
    def move(value):
        if not torch.is_tensor(value):
            return value
        return torch.empty(value.shape, dtype=dtype if value.is_floating_point() else value.dtype, device="cuda")

    return {name: move(value) for name, value in inputs.items()}


ON_A_GPU = [
    ("sd3", options, dtype, fused)
    for options in ({}, {"share_selection": True}, {"ratio": 0.6, "tile": 4})
    for dtype in (torch.float32, torch.bfloat16)
    for fused in (True, False)
]
for name in EVERY:
    ON_A_GPU += [(name, {"share_selection": True}, torch.bfloat16, True), (name, {}, torch.float32, False)]


@pytest.mark.parametrize("family, options, dtype, fused", ON_A_GPU, ids=str)
def test_a_pruned_step_on_a_gpu_depends_on_no_data_and_waits_for_nothing(family, options, dtype, fused):
    build, arguments, artifact = EVERY[family]
    model = build().to(dtype)
    source, wanted = artifact(model), arguments(model)
    mode = FakeTensorMode(allow_non_fake_inputs=False, static_shapes=True)
    on_a_pretended_gpu(model, mode)
    on_a_pretended_gpu(source.router, mode)
    handle = shiva_ext.enable(model, source, batched_guidance=True, fused=fused, **options)
    with mode, torch.no_grad():
        inputs = on_the_pretended_gpu(wanted, dtype)
        for sigma in (0.2, 0.8):
            handle.at(sigma)
            with WithoutGuard(), NoTransfers():
                output = model(**inputs)[0]
            assert output.device.type == "cuda" and len(output) == len(inputs["hidden_states"])


def test_reading_the_level_from_the_timestep_is_what_that_test_would_find():
    model, source = make_model(), make_artifact(varying_table())
    mode = FakeTensorMode(allow_non_fake_inputs=False, static_shapes=True)
    on_a_pretended_gpu(model, mode)
    on_a_pretended_gpu(source.router, mode)
    shiva_ext.enable(model, source)
    with mode, WithoutGuard(), torch.no_grad(), pytest.raises(DataDependentOutputException):
        model(
            **{
                name: torch.empty(v.shape, dtype=v.dtype, device="cuda") if torch.is_tensor(v) else v
                for name, v in make_inputs().items()
            }
        )
