"""Compares the native ops with shiva_ext.reference. Run as a module, it does a part of that and prints JSON."""

import json
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import shiva_ext
from shiva_ext import reference

from .cases import EPS, OPS, SEEDS, SIZES, TAU, Maker, Op, Size, floating, forward_backward, native, tuple_of, wide
from .device import CPU, host
from .tolerance import Target, combine_floor, layer_norm_floor, pair_floor, targets


def bits(t: Any) -> Any:
    """The bits of a floating tensor as integers of its width; anything else as it is."""
    if not torch.is_tensor(t) or not t.is_floating_point():
        return t
    return t.detach().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[t.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in every bit, so that NaN equals NaN and -0 differs from +0."""
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def _targets(op: Op, maker: Maker, backward: bool) -> list[Target]:
    """What the op must give for the case, from the reference: the outputs, or the gradients of the leaves."""
    function = getattr(reference, op.name)
    arguments = op.arguments(maker)
    names = [name for name, a in arguments.items() if torch.is_tensor(a) and a.is_floating_point()]
    inputs = [arguments[name].double() for name in names]
    plain = tuple_of(function(*arguments.values()))
    if backward:
        content = maker.content if op.gradient_content == "same" else "random"
        incoming = maker.gradients(plain, content)
        inputs += [g.double() for g in incoming]
        dtypes = [arguments[name].dtype for name in op.leaves]
    else:
        incoming = []
        dtypes = [out.dtype for out in plain]

    def exact(values: list[Tensor]) -> list[Tensor]:
        ready, leaves = op.split(arguments | dict(zip(names, values, strict=False)))
        outputs = tuple_of(function(*ready.values()))
        if not backward:
            return [out.detach() for out in outputs]
        return list(torch.autograd.grad(floating(outputs), leaves, values[len(names) :]))

    if op.copies_gradient if backward else op.copies or not op.leaves:
        return [Target(value, None, dtype) for value, dtype in zip(exact(inputs), dtypes, strict=True)]
    arithmetic_eps = torch.finfo(wide(maker.dtype)).eps
    eps = torch.finfo(maker.dtype).eps if op.rounds_hidden else arithmetic_eps
    floors: list[Tensor | float] = [0.0] * len(dtypes)
    if op.name == "soft_rank":
        difference = 2 * max((g.abs().max().item() for g in incoming if g.numel()), default=0.0)
        floors[0] = pair_floor(maker.N, arithmetic_eps) * (difference / TAU if backward else 1)
    if op.name == "gather_modulate" and backward and incoming[0].numel():
        x, index, slope = arguments["x"].double(), arguments["index"], incoming[0].double()
        slope = slope * (1 + arguments["scale"].double().unsqueeze(1))
        row_floor = layer_norm_floor(slope, reference.token_gather(x, index), EPS, arithmetic_eps)
        floors[0] = reference.token_scatter(torch.zeros_like(x[..., :1]), index, row_floor)
    if op.name == "expert_combine" and not backward:
        rows, place, weight = (arguments[name] for name in ("rows", "place", "weight"))
        floors[0] = combine_floor(rows.double(), place, weight.double(), arithmetic_eps)
    return targets(exact, inputs, dtypes, eps, arithmetic_eps, op.terms(maker.size), floors)


@lru_cache(maxsize=64)
def cached_targets(key: str, size: Size, dtype: torch.dtype, content: str, expanded: bool, seed: int, backward: bool):
    """The layouts that hold the same values share one set of targets."""
    layout = "expanded" if expanded else "contiguous"
    return _targets(OPS[key], Maker(size, dtype, content, layout, seed, device=CPU), backward)


def complaints(
    key: str,
    dtype: torch.dtype,
    content: str,
    layout: str,
    backward: bool,
    sizes: dict[str, Size] = SIZES,
    index: torch.dtype = torch.int64,
    seeds: tuple[int, ...] = SEEDS,
) -> list[str]:
    """Runs the op over sizes and seeds, and says where it differs from the reference."""
    op, found = OPS[key], []
    for size_name, size in sizes.items():
        for seed in seeds:
            wanted = cached_targets(key, size, dtype, content, layout == "expanded", seed, backward)
            maker = Maker(size, dtype, content, layout, seed, index)
            if backward:
                got = forward_backward(native(op), op, maker)[1]
            else:
                arguments = op.arguments(maker)
                got = tuple_of(native(op)(*arguments.values()))
                if op.copies:
                    # On integers, since torch's own copies of half precisions do not keep a NaN's payload.
                    plain = tuple_of(getattr(reference, op.name)(*(bits(host(a)) for a in arguments.values())))
                    if not all(torch.equal(bits(host(a)), b) for a, b in zip(got, plain, strict=True)):
                        found.append(f"{size_name}, seed {seed}: a copied value changed its bits")
            names = op.leaves if backward else [f"output {i}" for i in range(len(wanted))]
            for name, actual, target in zip(names, got, wanted, strict=True):
                if complaint := target.complaint(actual):
                    found.append(f"{size_name}, seed {seed}, {name}: {complaint}")
    return found


def main() -> None:
    """A part of the matrix for a process of its own. Prints {"cpu_capability": ..., "complaints": [...]}."""
    torch.set_num_threads(1)
    sizes = {name: SIZES[name] for name in ("odd", "typical")}
    found = []
    for key, op in OPS.items():
        for dtype in op.dtypes:
            for content, layout in (("random", "contiguous"), ("ties", "sliced"), ("nan", "contiguous")):
                for backward in (False, True) if op.leaves else (False,):
                    for complaint in complaints(key, dtype, content, layout, backward, sizes, seeds=(0,)):
                        found.append(f"{key}, {dtype}, {content}, {layout}, {complaint}")
    print(json.dumps({"cpu_capability": shiva_ext.build_info()["cpu_capability"], "complaints": found}))


if __name__ == "__main__":
    main()
