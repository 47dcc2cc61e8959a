"""A layer of experts against its formula, its balance loss against equation 5, and what it refuses."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shiva_ext.moe import MoEConfig, SparseMoE, expert_layers, record_routing
from shiva_ext.moe.experts import ACTIVATIONS, grouped_linear

D = 16


def make_layer(seed: int = 0, dim: int = D, **config) -> SparseMoE:
    torch.manual_seed(seed)
    layer = SparseMoE(dim, MoEConfig(**{"num_experts": 6, "expert_width": 24, **config}))
    with torch.no_grad():  # a router whose choices differ
        layer.router.weight.normal_()
    return layer


def by_hand(layer: SparseMoE, x: torch.Tensor) -> torch.Tensor:
    """Token by token, expert by expert, as the formula says."""
    config, experts = layer.config, layer.experts
    out = []
    for token in x.reshape(-1, x.shape[-1]):
        s = (layer.router.weight @ token).softmax(dim=0)
        total = layer.shared(token) if layer.shared is not None else torch.zeros_like(token)
        for i in s.topk(config.top_k).indices:
            hidden = experts.w_in[i] @ token
            if config.bias:
                hidden = hidden + experts.b_in[i]
            result = experts.w_out[i] @ ACTIVATIONS[config.activation](hidden)
            if config.bias:
                result = result + experts.b_out[i]
            total = total + s[i] * result
        out.append(total)
    return torch.stack(out).view(x.shape)


@pytest.mark.parametrize("shared", [0, 20])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_layer_is_the_weighted_sum_of_its_best_experts(activation, bias, shared):
    layer = make_layer(activation=activation, bias=bias, shared_width=shared)
    x = torch.randn(2, 9, D, requires_grad=True)
    got, wanted = layer(x), by_hand(layer, x)
    torch.testing.assert_close(got, wanted)
    leaves = [x, *layer.parameters()]
    incoming = torch.randn_like(got)
    torch.testing.assert_close(
        torch.autograd.grad(got, leaves, incoming), torch.autograd.grad(wanted, leaves, incoming), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("bias", [False, True])
def test_enough_capacity_changes_nothing(bias):
    free, limited = make_layer(bias=bias), make_layer(bias=bias, capacity_factor=6.0)
    x = torch.randn(3, 11, D)
    torch.testing.assert_close(free(x), limited(x))


def test_a_full_expert_leaves_its_later_tokens_to_the_other_choices():
    layer = make_layer(num_experts=2, top_k=1, capacity_factor=1.0)
    with torch.no_grad():
        layer.router.weight[0], layer.router.weight[1] = 1.0, -1.0
    x = torch.rand(8, D)  # all choose expert 0, which takes 4
    with record_routing(layer) as routing:
        out = layer(x)
    torch.testing.assert_close(out[:4], by_hand(layer, x)[:4])
    assert not out[4:].any()
    (call,) = routing.calls[""]
    assert call.dropped == 4 and call.count.tolist() == [8, 0]


@pytest.mark.parametrize(("tokens", "capacity"), [(1, 1), (24, 8), (25, 9), (0, 1)])
def test_the_capacity_is_rounded_up(tokens, capacity):
    assert MoEConfig(num_experts=6, top_k=2, capacity_factor=1.0).capacity(tokens) == capacity


def test_a_whole_capacity_stays_whole():
    assert MoEConfig(num_experts=10, top_k=1, capacity_factor=1.1).capacity(100) == 11


def test_as_many_choices_as_experts_and_a_flat_router_give_their_mean():
    layer = make_layer(top_k=6, shared_width=8)
    nn.init.zeros_(layer.router.weight)
    x = torch.randn(5, D)
    each = [layer.experts.map(lambda w, i=i: w[i : i + 1])(x[None])[0] for i in range(6)]
    torch.testing.assert_close(layer(x), torch.stack(each).mean(dim=0) + layer.shared(x))


def test_tokens_are_routed_by_themselves():
    layer, x = make_layer(), torch.randn(30, D)
    order = torch.randperm(30)
    torch.testing.assert_close(layer(x)[order], layer(x[order]))
    torch.testing.assert_close(layer(x)[:7], layer(x[:7]))


def test_no_tokens_pass():
    for factor in (None, 1.0):
        layer = make_layer(bias=True, capacity_factor=factor)
        x = torch.zeros(2, 0, D, requires_grad=True)
        with record_routing(layer) as routing:
            out = layer(x)
        assert out.shape == (2, 0, D) and routing.balance_loss() == 0
        out.sum().backward()


@pytest.mark.parametrize("factor", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_stay(dtype, factor):
    layer, x = make_layer(capacity_factor=factor).to(dtype), torch.randn(4, 7, D)
    out = layer(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), by_hand(make_layer(), x), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("factor", [None, 2.0])
def test_autocast_runs_the_experts_in_half_precision_and_the_router_not(factor):
    layer, x = make_layer(capacity_factor=factor, shared_width=8), torch.randn(40, D)
    with torch.autocast("cpu", torch.bfloat16):
        with record_routing(layer) as half:
            out = layer(x)
        out.float().sum().backward()
    with record_routing(layer) as full:
        wanted = layer(x)
    assert torch.equal(half.calls[""][0].experts, full.calls[""][0].experts)
    assert 0 < (out - wanted).abs().max() < 0.05
    assert layer.experts.w_in.grad.dtype == torch.float32 and layer.router.weight.grad.any()


@pytest.mark.parametrize("dim", [5, 16])
def test_grouped_linear_is_a_product_a_group_whatever_the_strides_allow(dim):
    x, weight = torch.randn(12, dim, requires_grad=True), torch.randn(4, 7 if dim == 5 else 8, dim, requires_grad=True)
    ends = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    got = grouped_linear(x, weight, ends)
    wanted = torch.cat([x[:5] @ weight[1].T, x[5:] @ weight[3].T])
    torch.testing.assert_close(got, wanted)
    incoming = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad(y, [x, weight], incoming) for y in (got, wanted)), strict=True):
        torch.testing.assert_close(a, b)


def balance(layer: SparseMoE, x: torch.Tensor) -> torch.Tensor:
    with record_routing(layer) as routing:
        layer(x)
    return routing.balance_loss()


def test_the_balance_loss_is_equation_5():
    layer, x = make_layer(), torch.randn(50, D)
    n, K, T = 6, 2, 50
    s = (x @ layer.router.weight.T).softmax(dim=1)
    chosen = F.one_hot(s.topk(K, dim=1).indices, n).sum(dim=1).float()
    wanted = 0.005 * sum(n / (K * T) * chosen[:, i].sum() * s[:, i].mean() for i in range(n))
    torch.testing.assert_close(balance(layer, x), wanted)


def test_flat_routing_costs_alpha_and_collapse_n_over_K_times_that():
    layer = make_layer(num_experts=8, balance_weight=0.25)
    nn.init.zeros_(layer.router.weight)
    torch.testing.assert_close(balance(layer, torch.randn(64, D)), torch.tensor(0.25))
    with torch.no_grad():
        layer.router.weight[:2] = 100.0
        layer.router.weight[2:] = -100.0
    torch.testing.assert_close(balance(layer, torch.rand(64, D)), torch.tensor(0.25 * 8 / 2))


def test_the_balance_losss_gradient_reaches_the_router_and_its_input_alone():
    layer, x = make_layer(shared_width=8), torch.randn(20, D, requires_grad=True)
    balance(layer, x).backward()
    assert layer.router.weight.grad.any() and x.grad.any()
    assert all(p.grad is None for p in [*layer.experts.parameters(), *layer.shared.parameters()])


def test_training_with_the_balance_loss_starves_no_expert():
    layer = make_layer(num_experts=8, balance_weight=0.5)
    with torch.no_grad():
        layer.router.weight.mul_(0.1)[:2] += 1  # two experts begin with nearly everything
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    x = torch.rand(256, D)
    for _ in range(100):
        with record_routing(layer) as routing:
            loss = F.mse_loss(layer(x), x.flip(1))
        optimizer.zero_grad()
        (loss + routing.balance_loss()).backward()
        optimizer.step()
    assert routing.load()[""].min() > 0.02


def test_a_record_sums_layers_and_averages_calls():
    model = nn.Sequential(make_layer(0), make_layer(1))
    x = torch.randn(10, D)
    with record_routing(model) as routing:
        model(x)
        model(2 * x)
    each = [[call.balance for call in calls] for calls in routing.calls.values()]
    assert [len(calls) for calls in each] == [2, 2]
    torch.testing.assert_close(routing.balance_loss(), 0.005 * sum(sum(calls) / 2 for calls in each))
    assert list(routing.load()) == ["0", "1"]
    assert all(share.shape == (6,) and share.sum().item() == pytest.approx(1) for share in routing.load().values())


def test_nothing_is_recorded_outside_the_block():
    layer = make_layer()
    with record_routing(layer):
        pass
    layer(torch.randn(3, D))
    assert layer.record is None
    with pytest.raises(RuntimeError, match="inside record_routing"), record_routing(layer) as routing:
        routing.balance_loss()
    assert layer.record is None
    with pytest.raises(RuntimeError, match="open for this model"), record_routing(layer), record_routing(layer):
        pass
    assert layer.record is None


def test_a_balance_without_a_gradient_is_refused_in_training():
    layer, x = make_layer(), torch.randn(20, D)
    with record_routing(layer) as routing:
        torch.utils.checkpoint.checkpoint(layer, x.requires_grad_(), use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"the layer was recorded without a gradient: .*use_reentrant=False"):
        routing.balance_loss()
    with torch.no_grad(), record_routing(layer) as routing:
        layer(x)
        assert routing.balance_loss() > 0
    with record_routing(layer.eval()) as routing, torch.no_grad():
        layer(x)
    assert routing.balance_loss() > 0


def test_a_replaced_router_is_called():
    """As adapters and offloading do it, which wrap the module and its call."""

    class Wrapped(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer, self.calls = base, 0

        def forward(self, tokens):
            self.calls += 1
            return -self.base_layer(tokens)

    layer, x = make_layer(), torch.randn(9, D)
    before = layer(x)
    layer.router = Wrapped(layer.router)
    assert not torch.allclose(layer(x), before) and layer.router.calls == 1


@pytest.mark.parametrize("factor", [None, 2.0])
def test_weights_on_another_device_come_by_the_modules_calls(factor):
    from accelerate import cpu_offload

    layer, x = make_layer(shared_width=8, bias=True, capacity_factor=factor), torch.randn(9, D)
    with torch.no_grad():
        wanted = layer(x)
        cpu_offload(layer, execution_device=torch.device("cpu"))
        assert layer.router.weight.is_meta
        assert torch.equal(layer(x), wanted)


def test_gradient_checkpointing_gives_the_same_gradients():
    layer, x = make_layer(), torch.randn(20, D)
    found = []
    for run in (layer, lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)):
        layer.zero_grad()
        with record_routing(layer) as routing:
            out = run(x)
        (out.square().mean() + routing.balance_loss()).backward()
        found.append([p.grad.clone() for p in layer.parameters()])
    torch.testing.assert_close(*found)


def test_a_model_without_experts_is_refused():
    with pytest.raises(ValueError, match=r"Linear has no expert layer; .*upcycle"):
        expert_layers(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"num_experts": 0}, r"num_experts must lie in \[1, 1024\], got 0"),
        ({"num_experts": 1025}, "got 1025"),
        ({"top_k": 0}, r"top_k must lie in \[1, 8\]"),
        ({"top_k": 9}, "got 9"),
        ({"expert_width": 0}, "expert_width"),
        ({"shared_width": -1}, "shared_width"),
        ({"activation": "relu"}, "swiglu, geglu, gelu, gelu-approximate, got 'relu'"),
        ({"capacity_factor": 0.0}, "capacity_factor"),
        ({"capacity_factor": float("nan")}, "capacity_factor"),
        ({"balance_weight": -1.0}, "balance_weight"),
    ],
)
def test_wrong_settings_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        MoEConfig(**wrong)


def test_without_a_capacity_it_compiles_with_breaks():
    layer, x = make_layer(), torch.randn(20, D)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_with_a_capacity_compiles_into_one_graph(bias):
    layer, x = make_layer(capacity_factor=1.5, shared_width=8, bias=bias), torch.randn(2, 20, D, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = []
    for function in (layer, compiled):
        out = function(x)
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])])
    torch.testing.assert_close(*found)
