"""ShivaRouter against eq. 8 and 9."""

import json
from dataclasses import asdict

import pytest
import torch

from shiva_ext.selection import RouterConfig, ShivaRouter

B, N, D, T, P = 2, 7, 12, 5, 6


def make(**options):
    torch.manual_seed(0)
    return ShivaRouter(D, T, P, **{"num_layers": 6, **options})


def inputs(dtype=torch.float32):
    torch.manual_seed(1)
    return [torch.randn(*shape).to(dtype) for shape in ((B, N, D), (B, T), (B, P))]


def score_of_one_token(router, layer, x, t, c):
    """Eq. 8 and 9 for one token, in float64."""
    group, embedding = router.groups[router.group(layer)], router.layer_embedding[layer].double()
    context = t @ group.proj_t.weight.double().T + c @ group.proj_p.weight.double().T
    context = context + embedding @ group.proj_l.weight.double().T
    hidden = x @ group.proj_x.weight.double().T + group.proj_x.bias.double() + context
    hidden = hidden * torch.sigmoid(hidden)
    normed = (hidden - hidden.mean()) / (hidden.var(correction=0) + router.config.eps).sqrt()
    normed = normed * group.norm.weight.double() + group.norm.bias.double()
    return (normed * group.out.weight[0].double()).sum()


@pytest.mark.parametrize("layer", range(1, 6))
def test_every_score_is_equation_9_of_its_own_token(layer):
    router = make()
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # so that the LayerNorm's affine part counts
    x, t, c = inputs()
    scores = router(layer, x, t, c)
    assert scores.shape == (B, N) and scores.dtype == torch.float32
    for b in range(B):
        for i in range(N):
            wanted = score_of_one_token(router, layer, x[b, i].double(), t[b].double(), c[b].double())
            torch.testing.assert_close(scores[b, i].double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("share", "first_layer", "groups"),
    [
        (1, 1, [0, 1, 2, 3, 4]),
        (2, 1, [0, 0, 1, 1, 2]),
        (6, 1, [0, 0, 0, 0, 0]),
        (2, 2, [0, 0, 1, 1]),
        (3, 3, [0, 0, 0]),
    ],
)
def test_adjacent_layers_share_a_router(share, first_layer, groups):
    router = make(share=share, first_layer=first_layer)
    assert [router.group(layer) for layer in range(first_layer, 6)] == groups
    assert len(router.groups) == groups[-1] + 1


def test_layers_that_share_a_router_differ_by_their_embedding():
    router, values = make(), inputs()
    assert not torch.allclose(router(1, *values), router(2, *values))
    with torch.no_grad():
        router.layer_embedding[2] = router.layer_embedding[1]
    assert torch.equal(router(1, *values), router(2, *values))


@pytest.mark.parametrize(
    ("share", "hidden", "groups", "millions"),
    [
        (24, 64, 1, 0.3),
        (24, 512, 1, 2.7),  # the paper prints 2.6
        (1, 512, 24, 64),
        (1, 64, 24, 8.0),
        (6, 128, 4, 2.7),
        (3, 64, 8, 2.7),
        (2, 64, 12, 4.0),  # the paper prints 4.1, more than half of its own 8.0
    ],
)
def test_the_configurations_of_the_papers_ablation_have_its_numbers_of_parameters(share, hidden, groups, millions):
    with torch.device("meta"):
        router = ShivaRouter(1536, 1536, 2048, num_layers=24, share=share, hidden=hidden, first_layer=0)
    assert len(router.groups) == groups
    count = sum(p.numel() for p in router.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.5 if millions == 64 else 0.05)


@pytest.mark.parametrize("layer", [-1, 0, 6])
def test_a_layer_without_a_router_is_an_error(layer):
    with pytest.raises(ValueError, match=f"layer {layer} has no router, wanted a layer from 1 to 5"):
        make()(layer, *inputs())


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_wrong_shape_is_named(position):
    values = inputs()
    values[position] = values[position][..., :-1]
    name = ("x", "timestep_embedding", "pooled_embedding")[position]
    with pytest.raises(ValueError, match=f"{name} has shape"):
        make()(1, *values)
    with pytest.raises(ValueError, match="x has shape"):
        make()(1, inputs()[0][0], *inputs()[1:])


@pytest.mark.parametrize("change", [{"share": 0}, {"hidden": 0}, {"first_layer": 6}, {"first_layer": -1}])
def test_a_bad_configuration_is_an_error(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        make(**change)


def test_the_configuration_survives_json():
    router = make(share=3, hidden=8, first_layer=2, eps=1e-6, layer_dim=16)
    config = RouterConfig(**json.loads(json.dumps(asdict(router.config))))
    copy = ShivaRouter.from_config(config)
    copy.load_state_dict(router.state_dict())
    assert config == router.config and torch.equal(copy(2, *inputs()), router(2, *inputs()))


def test_every_parameter_of_a_group_learns():
    router = make(share=6)
    weights = torch.randn(B, N)
    sum((router(layer, *inputs()) * weights).sum() for layer in range(1, 6)).backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_the_gradient_is_that_of_finite_differences():
    router = make(hidden=4, layer_dim=3).double()
    x, t, c = (value.requires_grad_() for value in inputs(torch.float64))
    assert torch.autograd.gradcheck(lambda *values: router(1, *values), (x, t, c))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tokens_give_float32_scores_near_those_of_float32(dtype):
    router, (x, t, c) = make(), inputs()
    scores = router(1, x.to(dtype), t.to(dtype), c.to(dtype))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, router(1, x, t, c), rtol=0.05, atol=0.05)


def test_autocast_leaves_the_context_in_float32():
    router, values = make(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        inside = router(1, *values)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, router(1, *values), rtol=1e-5, atol=1e-6)
