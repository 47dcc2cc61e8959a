"""The two networks: widened bit for bit, started from a teacher, called in diffusers' convention."""

import pytest
import torch
from diffusers import FluxTransformer2DModel

from shiva_ext.caf import initial_acceleration_model, initial_velocity_model, predict, scale_output, widen_input

from .networks import CHANNELS, FAMILIES, SIDE, conditions, draw


def inputs(batch=2, dtype=torch.float32):
    return draw(batch, CHANNELS, SIDE, SIDE, seed=1).to(dtype), torch.linspace(0, 1, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_widened_model_is_the_narrow_one_bit_for_bit(family, dtype):
    model = FAMILIES[family]().to(dtype)
    wide = widen_input(model)
    x, t = inputs()
    assert wide.config.in_channels == 2 * CHANNELS and wide.out_channels == model.out_channels
    with torch.no_grad():
        wanted = predict(model, x, t, conditions(family, 2), 1.5)
        for v0 in (torch.zeros_like(x), 100 * draw(*x.shape, seed=3)):
            assert torch.equal(predict(wide, x, t, conditions(family, 2), 1.5, v0), wanted - 2 * v0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_new_channels_can_be_learned(family):
    wide = widen_input(FAMILIES[family]())
    x, t = inputs()
    predict(wide, x, t, conditions(family, 2), 1.5, draw(*x.shape, seed=3)).square().mean().backward()
    gradient = wide.pos_embed.proj.weight.grad
    assert gradient[:, CHANNELS:].abs().max() > 0 and gradient[:, :CHANNELS].abs().max() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_widened_model_is_loaded_as_it_was_saved(family, tmp_path):
    wide = widen_input(FAMILIES[family]())
    torch.nn.init.normal_(wide.pos_embed.proj.weight)
    wide.save_pretrained(tmp_path)
    again = type(wide).from_pretrained(tmp_path)
    x, t = inputs()
    v0 = draw(*x.shape, seed=3)
    with torch.no_grad():
        got, wanted = (predict(each.eval(), x, t, conditions(family, 2), 1.5, v0) for each in (again, wide))
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_velocity_starts_as_the_teacher_has_it(family):
    """The teacher's output is noise - data; v0 is h times data - noise."""
    teacher = FAMILIES[family]()
    before = {name: p.clone() for name, p in teacher.state_dict().items()}
    x, t = inputs()
    with torch.no_grad():
        wanted = predict(teacher, x, t, conditions(family, 2), 1.5)
        got = predict(initial_velocity_model(teacher, 1.5), x, t, conditions(family, 2), 1.5)
        exact = predict(initial_velocity_model(teacher, 1.0), x, t, conditions(family, 2), 1.5)
    torch.testing.assert_close(got, -1.5 * wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(exact, -wanted)
    assert all(torch.equal(p, before[name]) for name, p in teacher.state_dict().items())


@pytest.mark.parametrize("h", [0.5, 1.0, 1.5])
def test_the_acceleration_starts_where_one_step_is_that_of_the_velocity_alone(h):
    velocity = initial_velocity_model(FAMILIES["sd3"](), h)
    acceleration = initial_acceleration_model(velocity, h)
    x0, t = inputs()[0], torch.zeros(2)
    with torch.no_grad():
        v0 = predict(velocity, x0, t, conditions("sd3", 2), h)
        a = predict(acceleration, x0, t, conditions("sd3", 2), h, v0)
    torch.testing.assert_close(x0 + v0 + a / 2, x0 + v0 / h, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("h", [0.5, 1.5])
def test_the_velocity_starts_as_the_teacher_has_it_everywhere_on_the_path(h):
    """At time t the path has a noise level of its own, and the teacher's timestep is that of its noise level."""
    teacher, t = FAMILIES["sd3"](), torch.tensor([0.3, 0.8])
    x0, x1 = inputs()[0], draw(2, CHANNELS, SIDE, SIDE, seed=4)
    sigma = 1 - t**2 - h * (t - t**2)
    x = sigma.view(-1, 1, 1, 1) * x0 + (1 - sigma.view(-1, 1, 1, 1)) * x1
    with torch.no_grad():
        wanted = teacher(x, timestep=1000 * sigma, **conditions("sd3", 2), return_dict=False)[0]
        got = predict(initial_velocity_model(teacher, h), x, t, conditions("sd3", 2), h)
    torch.testing.assert_close(got, -h * wanted, rtol=1e-5, atol=1e-5)


def test_the_acceleration_starts_with_the_velocitys_estimate_of_the_way():
    """a = 2 (x1 - x0) - 2 v0 with x1 - x0 as the velocity network has it at that time."""
    velocity, (x, t) = initial_velocity_model(FAMILIES["sd3"](), 1.5), inputs()
    v0 = draw(*x.shape, seed=3)
    with torch.no_grad():
        way = predict(velocity, x, t, conditions("sd3", 2), 1.5) / 1.5
        a = predict(initial_acceleration_model(velocity, 1.5), x, t, conditions("sd3", 2), 1.5, v0)
    torch.testing.assert_close(a, 2 * way - 2 * v0, rtol=1e-5, atol=1e-5)


def test_a_model_of_another_family_is_refused_by_name():
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    for make in (widen_input, lambda m: scale_output(m, 2.0), lambda m: initial_velocity_model(m, 1.5)):
        with pytest.raises(TypeError, match="FluxTransformer2DModel has no patch embedding.*SD3Transformer2DModel"):
            make(model)


def test_channels_and_shapes_that_do_not_fit_are_refused():
    model, (x, t) = FAMILIES["sd3"](), inputs()
    with pytest.raises(ValueError, match=r"takes 2 channels, got x \[2, 2, 8, 8\] and an initial velocity"):
        predict(model, x, t, conditions("sd3", 2), 1.5, x)
    with pytest.raises(ValueError, match=r"takes 4 channels, got x \[2, 2, 8, 8\]$"):
        predict(widen_input(model), x, t, conditions("sd3", 2), 1.5)
    with pytest.raises(ValueError, match=r"shape of x, \[2, 2, 8, 8\], got \[1, 2, 8, 8\]"):
        predict(widen_input(model), x, t, conditions("sd3", 2), 1.5, x[:1])


def test_half_precision_networks_give_float32():
    x, t = inputs()
    with torch.no_grad():
        assert predict(FAMILIES["sd3"]().bfloat16(), x, t, conditions("sd3", 2), 1.5).dtype == torch.float32
