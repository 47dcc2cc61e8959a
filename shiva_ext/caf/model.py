"""The two networks of CAF, made from a diffusers transformer.

The velocity network is such a transformer as it is; its output is the initial velocity v0. The acceleration network is
also told v0: its patch embedding takes twice the channels, those of x_t and then those of v0. The paper (CAF, arXiv
2411.00322) calls this initial-velocity conditioning and does it to a U-Net; that the patch embedding is the place for
it in a transformer is inferred.

What the acceleration network puts out is a + 2 v0, and :func:`predict` takes 2 v0 off again: the target is then
2 (x1 - x0), which a flow-matching model has learned to estimate, while the loss, a difference of two a, is the paper's.
Inferred, too: the paper's network has 500,000 steps to learn how to pass v0 on.
"""

import copy

import torch
from torch import Tensor, nn

from ..training.recipes import recipe_for
from .flow import timestep

# The last layer, which puts out patches, by class of transformer; the first one is ``pos_embed.proj`` in all of them.
OUTPUT_LAYERS = {
    "DiTTransformer2DModel": "proj_out_2",
    "PixArtTransformer2DModel": "proj_out",
    "SD3Transformer2DModel": "proj_out",
}


def family(model: nn.Module) -> str:
    """The class of :data:`OUTPUT_LAYERS` that a transformer is, or inherits from.

    Raises:
        TypeError: there is none.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in OUTPUT_LAYERS:
            return cls.__name__
    raise TypeError(
        f"caf: {type(model).__name__} has no patch embedding known here that could take the initial velocity, too; "
        f"wanted one of {', '.join(OUTPUT_LAYERS)} (a further one is a line in shiva_ext/caf/model.py)"
    )


def widen_input(model: nn.Module) -> nn.Module:
    """A copy of a transformer whose patch embedding takes twice the channels; the weights of the new ones are 0.

    Whatever the second half of the channels holds, the copy's output is the model's, bit for bit. The copy's
    configuration says ``in_channels=2 C`` and names ``out_channels``, so that ``from_pretrained`` loads it again.

    Args:
        model: ``SD3Transformer2DModel``, ``PixArtTransformer2DModel`` or ``DiTTransformer2DModel`` with C channels.

    Returns:
        A model of the same class, dtype, device and mode, with gradients.

    Raises:
        TypeError: a model of another family.
    """
    family(model)
    C, old = model.config.in_channels, model.pos_embed.proj
    # Not from_config: it would take settings that were left at their defaults, such as out_channels, from there again.
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    wide = type(model)(**{**config, "in_channels": 2 * C, "out_channels": model.out_channels})
    wide.to(old.weight.device)
    if wide.dtype != old.weight.dtype:  # diffusers warns of every conversion
        wide.to(old.weight.dtype)
    state = dict(model.state_dict())
    state["pos_embed.proj.weight"] = torch.cat([old.weight.detach(), torch.zeros_like(old.weight)], dim=1)
    wide.load_state_dict(state)
    return wide.train(model.training)


@torch.no_grad()
def scale_output(model: nn.Module, factor: float) -> nn.Module:
    """Multiply the last layer in place, and with it the model's output, by a factor; -1 is exact. Returns the model.

    Raises:
        TypeError: a model of a family that is not known here.
    """
    for parameter in getattr(model, OUTPUT_LAYERS[family(model)]).parameters():
        parameter.mul_(factor)
    return model


def initial_velocity_model(teacher: nn.Module, h: float) -> nn.Module:
    """A velocity network that begins as a flow-matching teacher would have it.

    The teacher's output estimates noise - data = -(x1 - x0), the network's target is v0 = h (x1 - x0): a copy of the
    teacher whose last layer is multiplied by -h starts with that estimate of v0, at every time, as it is told the noise
    level of the path. What is left to learn is which data belong to which noise. A teacher that predicts noise has no
    such meaning in its output; its copy is a start like another.

    Args:
        teacher: a transformer of :data:`OUTPUT_LAYERS`; it stays as it is.
        h: see :func:`~shiva_ext.caf.flow.initial_velocity`.

    Returns:
        a copy in float32 and eval mode, with gradients.
    """
    return scale_output(copy.deepcopy(teacher).float(), -h).eval().requires_grad_(True)


def initial_acceleration_model(velocity: nn.Module, h: float) -> nn.Module:
    """An acceleration network that begins as the velocity network would have it.

    The paper starts it from the velocity network. That estimates h (x1 - x0) at any time, and the target of what this
    one puts out is 2 (x1 - x0), so the last layer is multiplied by 2 / h, which is inferred. One step from noise then
    gives x0 + v0 / h, what the velocity network alone gives, and more steps take its later, better estimates, too.

    Args:
        velocity: the velocity network with C channels; it stays as it is.
        h: that it was trained with.

    Returns:
        a network with 2 C channels in float32 and eval mode, with gradients.
    """
    return scale_output(widen_input(velocity).float(), 2 / h).eval().requires_grad_(True)


def predict(
    model: nn.Module, x: Tensor, t: Tensor, conditions: dict[str, Tensor], h: float, v0: Tensor | None = None
) -> Tensor:
    """The velocity network's v0, or with ``v0`` the acceleration network's a, which is its output less 2 v0.

    Args:
        model: a network of C, or with ``v0`` 2 C, input channels.
        x: samples, floating [B, C, H, W].
        t: times in the paper's sense, [B]; the transformer is told 1000 times the noise level that the path has there.
        conditions: the transformer's further arguments, such as ``encoder_hidden_states``, [B, ...] each.
        h: of the path, see :func:`~shiva_ext.caf.flow.initial_velocity`.
        v0: initial velocity, [B, C, H, W].

    Returns:
        float32 [B, C, H, W], or float64 if x is; what the transformer puts out beyond C channels (variance) is dropped.

    Raises:
        ValueError: channels or shapes that do not fit.
    """
    if v0 is not None and v0.shape != x.shape:
        raise ValueError(f"caf: the initial velocity must have the shape of x, {list(x.shape)}, got {list(v0.shape)}")
    channels = model.config.in_channels
    if x.ndim != 4 or x.shape[1] * (1 if v0 is None else 2) != channels:
        beside = "" if v0 is None else " and an initial velocity of as many channels"
        raise ValueError(f"caf: {type(model).__name__} takes {channels} channels, got x {list(x.shape)}{beside}")
    if not len(x):
        return x.to(torch.promote_types(x.dtype, torch.float32))  # diffusers' attention takes no empty batch
    recipe, dtype = recipe_for(model), model.pos_embed.proj.weight.dtype
    noisy = (x if v0 is None else torch.cat([x, v0], dim=1)).to(dtype)
    conditions = {k: c.to(dtype) if c.is_floating_point() else c for k, c in conditions.items()}
    output = model(**recipe.inputs(model, noisy, timestep(t.to(x.device), h), conditions), return_dict=False)[0]
    found = recipe.prediction(output, x).to(torch.promote_types(x.dtype, torch.float32))
    return found if v0 is None else found - 2 * v0
