"""Fake kernels, autograd and autocast of torch.ops.shiva, op by op in the order of csrc/library.cpp.

The stable ABI has no C++ registration for these. Shapes follow from the arguments, never from data, so that traced
graphs have no data-dependent operation.
"""

import torch
from torch import Tensor

from . import _library  # noqa: F401  (defines the ops)

_ops = torch.ops.shiva
_autocast = torch.library.Library("shiva", "IMPL")


def _check(condition, op: str, message: str) -> None:
    if not condition:
        raise RuntimeError(f"shiva::{op}: {message}")


def register_autograd(name: str, backward, *, setup_context) -> None:
    """torch.library's, for a backward that has none of its own: to differentiate it again raises.

    torch would take the gradients for constants, and second derivatives for zero.
    """
    message = f"{name.replace('::', '.')} has no second derivative: its gradient cannot be differentiated again"

    def once(ctx, *grads):
        with torch.no_grad():
            found = backward(ctx, *grads)
        used = (*grads, *ctx.saved_tensors) if torch.is_grad_enabled() else ()
        if not any(isinstance(t, Tensor) and t.requires_grad for t in used):
            return found
        outputs = found if isinstance(found, tuple) else (found,)
        tensors = [t.detach().requires_grad_() for t in outputs if isinstance(t, Tensor)]
        refusing = torch._C._functions.DelayedError(message.encode(), len(tensors))(*tensors)
        refusing = iter(refusing if isinstance(refusing, (tuple, list)) else (refusing,))
        outputs = tuple(next(refusing) if isinstance(t, Tensor) else t for t in outputs)
        return outputs if isinstance(found, tuple) else outputs[0]

    torch.library.register_autograd(name, once, setup_context=setup_context)


def register_fake(name: str):
    """Decorator: a fake kernel, which first refuses arguments on different devices, as meta would win the dispatch."""
    op = name.removeprefix("shiva::")

    def register(fake):
        names = [argument.name for argument in getattr(_ops, op).default._schema.arguments]

        def kernel(*args):
            tensors = [(n, a) for n, a in zip(names, args, strict=False) if isinstance(a, Tensor)]
            first, reference = tensors[0]
            for other, tensor in tensors[1:]:
                _check(
                    tensor.device == reference.device,
                    op,
                    f"{other} is on {tensor.device}, but {first} is on {reference.device}; move all arguments to one "
                    "device",
                )
            return fake(*args)

        return torch.library.register_fake(name, kernel)

    return register


def _acc(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != dtype else tensor


def _register_autocast(name: str, convert) -> None:
    """Under autocast, call the op with ``convert(autocast dtype, *args)`` in place of its arguments."""
    op = getattr(_ops, name).default
    for device in ("cpu", "cuda"):

        def kernel(*args, device=device):
            key = torch._C.DispatchKey.AutocastCPU if device == "cpu" else torch._C.DispatchKey.AutocastCUDA
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return op(*convert(torch.get_autocast_dtype(device), *args))

        _autocast.impl(name, kernel, "AutocastCPU" if device == "cpu" else "AutocastCUDA")


def _widest(*positions: int):
    """Autocast rule: promote the float arguments at these positions to their widest dtype."""

    def convert(_, *args):
        dtype = args[positions[0]].dtype
        for position in positions[1:]:
            dtype = torch.promote_types(dtype, args[position].dtype)
        return [_cast(arg, dtype) if i in positions else arg for i, arg in enumerate(args)]

    return convert


# topk_select


@register_fake("shiva::topk_select")
def _(scores, k):
    _check(scores.dim() == 2, "topk_select", f"scores must have 2 dimensions, got shape {list(scores.shape)}")
    B, N = scores.shape
    torch._check(k >= 0)
    torch._check(k <= N)
    return scores.new_empty((B, k), dtype=torch.int64), scores.new_empty((B, N - k), dtype=torch.int64)


# soft_rank


@register_fake("shiva::soft_rank")
def _(scores, tau):
    return torch.empty(scores.shape, dtype=_acc(scores), device=scores.device)


@register_fake("shiva::soft_rank_backward")
def _(grad, scores, tau):
    return torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)


def _soft_rank_setup(ctx, inputs, output):
    scores, ctx.tau = inputs
    ctx.save_for_backward(scores)


def _soft_rank_backward(ctx, grad):
    return _ops.soft_rank_backward(grad, ctx.saved_tensors[0], ctx.tau), None


register_autograd("shiva::soft_rank", _soft_rank_backward, setup_context=_soft_rank_setup)
_register_autocast("soft_rank", lambda _, scores, tau: (_cast(scores, _acc(scores)), tau))


# token_gather


@register_fake("shiva::token_gather")
def _(x, index):
    return x.new_empty((*index.shape, x.shape[-1]))


@register_fake("shiva::token_gather_backward")
def _(grad, index, n, broadcast):
    B, _, D = grad.shape
    return grad.new_empty((n, D) if broadcast else (B, n, D))


def _token_gather_setup(ctx, inputs, output):
    x, index = inputs
    ctx.n, ctx.broadcast = x.shape[-2], x.dim() == 2
    ctx.save_for_backward(index)


def _token_gather_backward(ctx, grad):
    return _ops.token_gather_backward(grad, ctx.saved_tensors[0], ctx.n, ctx.broadcast), None


register_autograd("shiva::token_gather", _token_gather_backward, setup_context=_token_gather_setup)


# token_scatter


@register_fake("shiva::token_scatter")
def _(base, index, src):
    return torch.empty(base.shape, dtype=base.dtype, device=base.device)


@register_fake("shiva::token_scatter_")
def _(base, index, src):
    return None


@register_fake("shiva::token_scatter_backward")
def _(grad, index):
    B, _, D = grad.shape
    return torch.empty(grad.shape, dtype=grad.dtype, device=grad.device), grad.new_empty((B, index.shape[1], D))


def _token_scatter_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _token_scatter_backward(ctx, grad):
    grad_base, grad_src = _ops.token_scatter_backward(grad, ctx.saved_tensors[0])
    return grad_base, None, grad_src


register_autograd("shiva::token_scatter", _token_scatter_backward, setup_context=_token_scatter_setup)
_register_autocast("token_scatter", _widest(0, 2))
_register_autocast("token_scatter_", lambda _, base, index, src: (base, index, _cast(src, base.dtype)))


# residual_gate


@register_fake("shiva::residual_gate")
def _(x, inclusion, kept):
    B, _, D = x.shape
    return x.new_empty((B, kept.shape[1], D)), torch.empty(x.shape, dtype=x.dtype, device=x.device)


@register_fake("shiva::residual_gate_backward")
def _(grad_selected, grad_base, x, kept):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty(x.shape[:2], dtype=_acc(x))


def _residual_gate_setup(ctx, inputs, output):
    x, _, kept = inputs
    ctx.save_for_backward(x, kept)


def _residual_gate_backward(ctx, grad_selected, grad_base):
    grad_x, grad_inclusion = _ops.residual_gate_backward(grad_selected, grad_base, *ctx.saved_tensors)
    return grad_x, grad_inclusion, None


register_autograd("shiva::residual_gate", _residual_gate_backward, setup_context=_residual_gate_setup)
_register_autocast("residual_gate", lambda _, x, inclusion, kept: (x, _cast(inclusion, _acc(x)), kept))


# counterfactual_scatter


@register_fake("shiva::counterfactual_scatter")
def _(base, kept, src, inclusion, update, kappa):
    return torch.empty(base.shape, dtype=base.dtype, device=base.device)


@register_fake("shiva::counterfactual_scatter_backward")
def _(grad, base, kept, src, update, kappa):
    B, N, D = base.shape
    grad_base = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    return grad_base, base.new_empty((B, kept.shape[1], D)), base.new_empty((B, N), dtype=_acc(base))


def _counterfactual_setup(ctx, inputs, output):
    base, kept, src, _, update, ctx.kappa = inputs
    ctx.save_for_backward(base, kept, src, update)


def _counterfactual_backward(ctx, grad):
    grads = _ops.counterfactual_scatter_backward(grad, *ctx.saved_tensors, ctx.kappa)
    return grads[0], None, grads[1], grads[2], None, None


register_autograd("shiva::counterfactual_scatter", _counterfactual_backward, setup_context=_counterfactual_setup)


def _counterfactual_autocast(_, base, kept, src, inclusion, update, kappa):
    _, base, src, update = _widest(1, 2, 3)(None, None, base, src, update)
    return base, kept, src, _cast(inclusion, _acc(base)), update, kappa


_register_autocast("counterfactual_scatter", _counterfactual_autocast)


# router_score


@register_fake("shiva::router_score")
def _(x, context, w_in, ln_weight, ln_bias, w_out, eps):
    return x.new_empty(x.shape[:2], dtype=_acc(x))


@register_fake("shiva::router_score_and_projection")
def _(x, context, w_in, ln_weight, ln_bias, w_out, eps):
    size = (*x.shape[:2], w_in.shape[0]) if x.device.type == "cpu" else (0,)
    return x.new_empty(x.shape[:2], dtype=_acc(x)), x.new_empty(size)


@register_fake("shiva::router_score_backward")
def _(grad, x, context, w_in, ln_weight, ln_bias, w_out, eps, projection=None):
    inputs = (x, context, w_in, ln_weight, ln_bias, w_out)
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in inputs)


def _router_score_setup(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _router_score_backward(ctx, grad):
    return *_ops.router_score_backward(grad, *ctx.saved_tensors, ctx.eps), None


register_autograd("shiva::router_score", _router_score_backward, setup_context=_router_score_setup)


def _projection_setup(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _projection_backward(ctx, grad, _):
    *tensors, projection = ctx.saved_tensors
    return *_ops.router_score_backward(grad, *tensors, ctx.eps, projection), None


register_autograd("shiva::router_score_and_projection", _projection_backward, setup_context=_projection_setup)


def _router_score_autocast(dtype, x, context, w_in, ln_weight, ln_bias, w_out, eps):
    if x.dtype == torch.float64:
        return x, context, w_in, ln_weight, ln_bias, w_out, eps
    small = [_cast(t, torch.float32) for t in (context, ln_weight, ln_bias, w_out)]
    return _cast(x, dtype), small[0], _cast(w_in, dtype), *small[1:], eps


_register_autocast("router_score", _router_score_autocast)
_register_autocast("router_score_and_projection", _router_score_autocast)


# gather_modulate


@register_fake("shiva::gather_modulate")
def _(x, index, shift, scale, eps):
    return x.new_empty((*index.shape, x.shape[-1]))


@register_fake("shiva::gather_modulate_backward")
def _(grad, x, index, scale, eps):
    B, N, D = x.shape
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty((B, D)), x.new_empty((B, D))


def _gather_modulate_setup(ctx, inputs, output):
    x, index, _, scale, ctx.eps = inputs
    ctx.save_for_backward(x, index, scale)


def _gather_modulate_backward(ctx, grad):
    x, index, scale = ctx.saved_tensors
    grad_x, grad_shift, grad_scale = _ops.gather_modulate_backward(grad, x, index, scale, ctx.eps)
    return grad_x, None, grad_shift, grad_scale, None


register_autograd("shiva::gather_modulate", _gather_modulate_backward, setup_context=_gather_modulate_setup)
_register_autocast("gather_modulate", _widest(0, 2, 3))


# scatter_residual


@register_fake("shiva::scatter_residual")
def _(base, index, update, gate):
    return torch.empty(base.shape, dtype=base.dtype, device=base.device)


@register_fake("shiva::scatter_residual_backward")
def _(grad, index, update, gate):
    B, _, D = grad.shape
    return grad.new_empty((B, index.shape[1], D)), grad.new_empty((B, D))


def _scatter_residual_setup(ctx, inputs, output):
    _, index, update, gate = inputs
    ctx.save_for_backward(index, update, gate)


def _scatter_residual_backward(ctx, grad):
    index, update, gate = ctx.saved_tensors
    grad_update, grad_gate = _ops.scatter_residual_backward(grad, index, update, gate)
    return grad, None, grad_update, grad_gate


register_autograd("shiva::scatter_residual", _scatter_residual_backward, setup_context=_scatter_residual_setup)
_register_autocast("scatter_residual", _widest(0, 2, 3))


# scatter_mean


@register_fake("shiva::scatter_mean")
def _(x, position, num_groups):
    B, _, D = x.shape
    torch._check(num_groups >= 0)
    return x.new_empty((B, num_groups, D))


@register_fake("shiva::scatter_mean_backward")
def _(grad, position):
    return grad.new_empty((*position.shape, grad.shape[-1]))


def _scatter_mean_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _scatter_mean_backward(ctx, grad):
    return _ops.scatter_mean_backward(grad, ctx.saved_tensors[0]), None, None


register_autograd("shiva::scatter_mean", _scatter_mean_backward, setup_context=_scatter_mean_setup)


# facility_location


@register_fake("shiva::facility_location")
def _(similarity, count):
    shape = list(similarity.shape)
    _check(similarity.dim() == 3, "facility_location", f"similarity must have 3 dimensions, got shape {shape}")
    torch._check(count >= 0)
    torch._check(count <= similarity.shape[1])
    return similarity.new_empty((similarity.shape[0], count), dtype=torch.int64)


# expert_dispatch


def _placed(op: str, rows: Tensor, place: Tensor) -> None:
    for name, tensor in (("rows", rows), ("place", place)):
        _check(tensor.dim() == 2, op, f"{name} must have 2 dimensions, got shape {list(tensor.shape)}")


@register_fake("shiva::expert_dispatch")
def _(x, experts, num_experts, capacity=0):
    _placed("expert_dispatch", x, experts)
    torch._check(num_experts >= 1)
    torch._check(capacity >= 0)
    T, K = experts.shape
    R = num_experts * capacity if capacity else T * K
    place = experts.new_empty((T, K), dtype=torch.int64)
    return x.new_empty((R, x.shape[1])), place, experts.new_empty((num_experts,), dtype=torch.int32)


@register_fake("shiva::expert_dispatch_backward")
def _(grad, place):
    return grad.new_empty((place.shape[0], grad.shape[1]))


def _expert_dispatch_setup(ctx, inputs, output):
    ctx.save_for_backward(output[1])


def _expert_dispatch_backward(ctx, grad, *_):
    return _ops.expert_dispatch_backward(grad, ctx.saved_tensors[0]), None, None, None


register_autograd("shiva::expert_dispatch", _expert_dispatch_backward, setup_context=_expert_dispatch_setup)


# expert_combine


@register_fake("shiva::expert_combine")
def _(rows, place, weight):
    _placed("expert_combine", rows, place)
    return rows.new_empty((place.shape[0], rows.shape[1]))


@register_fake("shiva::expert_combine_backward")
def _(grad, rows, place, weight):
    return rows.new_empty(rows.shape), weight.new_empty(place.shape, dtype=_acc(rows))


def _expert_combine_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _expert_combine_backward(ctx, grad):
    rows, place, weight = ctx.saved_tensors
    grad_rows, grad_weight = _ops.expert_combine_backward(grad, rows, place, weight)
    return grad_rows, None, _cast(grad_weight, weight.dtype)


register_autograd("shiva::expert_combine", _expert_combine_backward, setup_context=_expert_combine_setup)
_register_autocast("expert_combine", lambda _, rows, place, weight: (rows, place, _cast(weight, _acc(rows))))


# ema_scan


@register_fake("shiva::ema_scan")
def _(x, p):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@register_fake("shiva::ema_scan_backward")
def _(grad, x, p, e):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), p.new_empty(p.shape, dtype=_acc(x))


def _ema_scan_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output)


def _ema_scan_backward(ctx, grad):
    x, p, e = ctx.saved_tensors
    grad_x, grad_p = _ops.ema_scan_backward(grad, x, p, e)
    return grad_x, _cast(grad_p, p.dtype)


register_autograd("shiva::ema_scan", _ema_scan_backward, setup_context=_ema_scan_setup)
_register_autocast("ema_scan", lambda _, x, p: (x, _cast(p, _acc(x))))
