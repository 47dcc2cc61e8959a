"""Blocks of diffusers on their kept tokens alone, without writing and reading the gathered tokens twice.

A wrapped block gathers its tokens, normalises, modulates, gates and adds them in steps of their own, and scatters them
back. Here the entry is :func:`~shiva_ext.ops.gather_modulate` and the exit :func:`~shiva_ext.ops.scatter_residual`; all
between, the text stream included, are the block's own modules. Results are those of the wrapped block within rounding:
sums that it rounds to half precision step by step are rounded once.

These functions restate forwards of diffusers, so each is used only while those forwards read as they did when it was
written (:func:`fingerprint`), and only where nobody listens to a module that is passed over.
"""

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops


def _modulation(norm: nn.Module, temb: Tensor, x: Tensor, parts: int) -> tuple[Tensor, ...]:
    """The adaptive norm's shifts, scales and gates [B,D], in x's dtype, in the order of diffusers' chunks."""
    return norm.linear(norm.silu(temb)).to(x.dtype).chunk(parts, dim=1)


def _joint(block: nn.Module, x: Tensor, kept: Tensor, arguments: dict, context_ends: bool, options: dict):
    """A block over an image and a text stream with one attention; returns (text or None, image)."""
    context, temb = arguments["encoder_hidden_states"], arguments["temb"]
    options = {**(arguments.get("joint_attention_kwargs") or {}), **options}
    second = getattr(block, "attn2", None)
    parts = _modulation(block.norm1, temb, x, 6 if second is None else 9)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts[:6]
    eps = block.norm1.norm.eps
    if context_ends:
        context_entry = block.norm1_context(context, temb)
    else:
        context_entry, *modulation = block.norm1_context(context, emb=temb)
    entry = ops.gather_modulate(x, kept, shift, scale, eps)
    update, context_update = block.attn(hidden_states=entry, encoder_hidden_states=context_entry, **options)
    tokens = ops.scatter_residual(x, kept, update.to(x.dtype), gate)
    if second is not None:
        shift, scale, gate = parts[6:]
        update = second(hidden_states=ops.gather_modulate(x, kept, shift, scale, eps), **options)
        tokens = ops.scatter_residual(tokens, kept, update.to(x.dtype), gate)
    entry = ops.gather_modulate(tokens, kept, shift_mlp, scale_mlp, block.norm2.eps)
    tokens = ops.scatter_residual(tokens, kept, block.ff(entry).to(x.dtype), gate_mlp)
    if context_ends:
        return None, tokens
    gate, shift_mlp, scale_mlp, gate_mlp = (each.unsqueeze(1) for each in modulation)
    context = context + gate * context_update
    entry = block.norm2_context(context) * (1 + scale_mlp) + shift_mlp
    return context + gate_mlp * block.ff_context(entry), tokens


def sd3_block(block: nn.Module, x: Tensor, kept: Tensor, arguments: dict):
    """``JointTransformerBlock``; x [B,N,D], kept [B,k]; returns what the block does, with all N tokens."""
    return _joint(block, x, kept, arguments, block.context_pre_only, {})


def flux_block(block: nn.Module, x: Tensor, kept: Tensor, arguments: dict):
    """``FluxTransformerBlock``; its rotary tables are those of the text and the kept tokens."""
    options = {"image_rotary_emb": arguments.get("image_rotary_emb")}
    context, tokens = _joint(block, x, kept, arguments, False, options)
    return context.clip(-65504, 65504) if context.dtype == torch.float16 else context, tokens


def flux_single_block(block: nn.Module, x: Tensor, kept: Tensor, arguments: dict):
    """``FluxSingleTransformerBlock``, over text and image in one stream."""
    context = arguments["encoder_hidden_states"]
    options = arguments.get("joint_attention_kwargs") or {}
    shift, scale, gate = _modulation(block.norm, arguments["temb"], x, 3)
    eps, T = block.norm.norm.eps, context.shape[1]
    text = F.layer_norm(context, context.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]
    entry = torch.cat([text, ops.gather_modulate(x, kept, shift, scale, eps)], dim=1)
    hidden = block.act_mlp(block.proj_mlp(entry))
    attended = block.attn(hidden_states=entry, image_rotary_emb=arguments.get("image_rotary_emb"), **options)
    update = block.proj_out(torch.cat([attended, hidden], dim=2))
    context = context + gate[:, None] * update[:, :T]
    return context, ops.scatter_residual(x, kept, update[:, T:].to(x.dtype), gate)


def pixart_block(block: nn.Module, x: Tensor, kept: Tensor, arguments: dict) -> Tensor:
    """``BasicTransformerBlock`` as PixArt has it: self-attention, cross-attention, MLP.

    Its cross-attention reads the tokens without a norm, so they are gathered, and stay so up to the exit.
    """
    B, k = kept.shape
    modulation = block.scale_shift_table[None] + arguments["timestep"].reshape(B, 6, -1)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.to(x.dtype).unbind(1)
    options = arguments.get("cross_attention_kwargs") or {}
    entry = ops.gather_modulate(x, kept, shift, scale, block.norm1.eps)
    tokens = torch.addcmul(ops.token_gather(x, kept), gate[:, None], block.attn1(entry, **options).to(x.dtype))
    if block.attn2 is not None:
        prompt, mask = arguments.get("encoder_hidden_states"), arguments.get("encoder_attention_mask")
        tokens = tokens + block.attn2(tokens, encoder_hidden_states=prompt, attention_mask=mask, **options)
    every = torch.arange(k, device=x.device).repeat(B, 1)
    entry = ops.gather_modulate(tokens, every, shift_mlp, scale_mlp, block.norm2.eps)
    return ops.token_scatter(x, kept, torch.addcmul(tokens, gate_mlp[:, None], block.ff(entry).to(x.dtype)))


def dit_block(block: nn.Module, x: Tensor, kept: Tensor, arguments: dict) -> Tensor:
    """``BasicTransformerBlock`` as DiT has it: the norm embeds timestep and class itself."""
    norm, options = block.norm1, arguments.get("cross_attention_kwargs") or {}
    temb = norm.emb(arguments["timestep"], arguments["class_labels"], hidden_dtype=x.dtype)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = _modulation(norm, temb, x, 6)
    update = block.attn1(ops.gather_modulate(x, kept, shift, scale, norm.norm.eps), **options)
    tokens = ops.scatter_residual(x, kept, update.to(x.dtype), gate)
    entry = ops.gather_modulate(tokens, kept, shift_mlp, scale_mlp, block.norm3.eps)
    return ops.scatter_residual(tokens, kept, block.ff(entry).to(x.dtype), gate_mlp)


def qwenimage_block(block: nn.Module, x: Tensor, kept: Tensor, arguments: dict):
    """``QwenImageTransformerBlock`` with one timestep a sample."""
    context, temb = arguments["encoder_hidden_states"], arguments["temb"]
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = block.img_mod(temb).to(x.dtype).chunk(6, dim=-1)
    context_entry, context_exit = block.txt_mod(temb).chunk(2, dim=-1)
    normed, context_gate = block._modulate(block.txt_norm1(context), context_entry)
    update, context_update = block.attn(
        hidden_states=ops.gather_modulate(x, kept, shift, scale, block.img_norm1.eps),
        encoder_hidden_states=normed,
        encoder_hidden_states_mask=arguments.get("encoder_hidden_states_mask"),
        image_rotary_emb=arguments.get("image_rotary_emb"),
        **(arguments.get("joint_attention_kwargs") or {}),
    )
    tokens = ops.scatter_residual(x, kept, update.to(x.dtype), gate)
    entry = ops.gather_modulate(tokens, kept, shift_mlp, scale_mlp, block.img_norm2.eps)
    tokens = ops.scatter_residual(tokens, kept, block.img_mlp(entry).to(x.dtype), gate_mlp)
    context = context + context_gate * context_update
    normed, context_gate = block._modulate(block.txt_norm2(context), context_exit)
    return context + context_gate * block.txt_mlp(normed), tokens


class FusedForm(NamedTuple):
    """What stands in for one class of blocks, where they have the expected attributes."""

    run: Callable  # (block, x [B,N,D], kept [B,k], arguments by name) -> the block's output, with all N tokens
    adaptive_norm: str | None  # the submodule whose forward is restated too
    layer_norms: tuple[str, ...]  # the LayerNorms, none with weights, that are restated
    expects: dict[str, object]  # attributes of the block, without which it does something else
    written_for: frozenset[str]  # fingerprints of the functions that are restated
    methods: tuple[str, ...] = ("forward",)  # of the block, that are restated


FORMS: dict[str, tuple[FusedForm, ...]] = {
    "JointTransformerBlock": (
        FusedForm(
            run=sd3_block,
            adaptive_norm="norm1",
            layer_norms=("norm1.norm", "norm2"),
            expects={},
            written_for=frozenset({"c40654b3af216c8f", "cb41454c909f1e8e"}),  # with one attention, with two
        ),
    ),
    "FluxTransformerBlock": (
        FusedForm(
            run=flux_block,
            adaptive_norm="norm1",
            layer_norms=("norm1.norm", "norm2"),
            expects={},
            written_for=frozenset({"57dc71122f69da22"}),
        ),
    ),
    "FluxSingleTransformerBlock": (
        FusedForm(
            run=flux_single_block,
            adaptive_norm="norm",
            layer_norms=("norm.norm",),
            expects={},
            written_for=frozenset({"b2525902460cc1c0"}),
        ),
    ),
    "BasicTransformerBlock": (
        FusedForm(
            run=pixart_block,
            adaptive_norm=None,
            layer_norms=("norm1", "norm2"),
            expects={"norm_type": "ada_norm_single", "pos_embed": None, "only_cross_attention": False},
            written_for=frozenset({"fae281bd5a05a865"}),
        ),
        FusedForm(
            run=dit_block,
            adaptive_norm="norm1",
            layer_norms=("norm1.norm", "norm3"),
            expects={"norm_type": "ada_norm_zero", "pos_embed": None, "only_cross_attention": False, "attn2": None},
            written_for=frozenset({"275aaba0657e75b3"}),
        ),
    ),
    "QwenImageTransformerBlock": (
        FusedForm(
            run=qwenimage_block,
            adaptive_norm=None,
            layer_norms=("img_norm1", "img_norm2"),
            expects={"zero_cond_t": False},
            written_for=frozenset({"e74049c76cab0c96"}),
            methods=("forward", "_modulate"),
        ),
    ),
}


@cache
def fingerprint(*functions: Callable) -> str:
    """Of functions, whatever their comments, docstrings and layout; empty where there is no source."""
    try:
        trees = [ast.parse(textwrap.dedent(inspect.getsource(function))) for function in functions]
    except (OSError, TypeError):
        return ""
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
    return hashlib.sha256(repr(_meaning(trees)).encode()).hexdigest()[:16]


def _meaning(node):
    """A syntax tree as nested tuples, without annotations and without what differs between versions of Python."""
    if isinstance(node, list):
        return [_meaning(each) for each in node]
    if not isinstance(node, ast.AST):
        return node
    skipped = ("annotation", "returns", "ctx", "kind", "type_comment", "type_params")
    fields = [(name, value) for name, value in ast.iter_fields(node) if name not in skipped]
    return (type(node).__name__, *((name, _meaning(value)) for name, value in fields if value is not None))


def find_form(block: nn.Module) -> FusedForm | str:
    """The fused form of a block, or the reason why it has none."""
    cls = type(block)
    unlike = f"{cls.__name__} has no fused form"
    for form in FORMS.get(cls.__name__, ()):
        other = [name for name, value in form.expects.items() if getattr(block, name, value) != value]
        if other:
            unlike = f"{other[0]} is {getattr(block, other[0])!r}"
            continue
        restated, functions = [cls], [getattr(cls, name) for name in form.methods]
        if form.adaptive_norm is not None:
            restated.append(type(block.get_submodule(form.adaptive_norm)))
            functions.append(restated[-1].forward)
        if fingerprint(*functions) in form.written_for:
            return form
        return f"the installed diffusers has another {' or '.join(c.__name__ for c in restated)}"
    return unlike


def why_not(block: nn.Module, form: FusedForm, forward: Callable, arguments: dict) -> str | None:
    """The reason why a call of the block must be wrapped although it has a fused form; None if there is none.

    What was found at the start is looked at again where it can be replaced later.

    Args:
        forward: what the hook would call; another hook may be below it.
        arguments: of the call, by name; empty to ask about calls in general.
    """
    if getattr(forward, "__func__", None) is not type(block).forward:
        return "another hook changes the block's forward"
    if getattr(block, "_chunk_size", None) is not None:
        return "its feed-forward is cut in chunks"
    for name in form.layer_norms:
        norm = block.get_submodule(name)
        if type(norm) is not nn.LayerNorm or norm.weight is not None or norm.bias is not None:
            return f"{name} is not a LayerNorm without weights"
    for name in (form.adaptive_norm, *form.layer_norms):
        module = None if name is None else block.get_submodule(name)
        if module is not None and (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)):
            return f"{name} has a hook"
    if form.run is flux_block and (arguments.get("joint_attention_kwargs") or {}).get("ip_hidden_states") is not None:
        return "an IP-Adapter adds to its output"
    if (
        form.run in (pixart_block, dit_block)
        and (arguments.get("cross_attention_kwargs") or {}).get("gligen") is not None
    ):
        return "GLIGEN adds to its attention"
    if form.run in (flux_single_block, qwenimage_block):
        x = arguments.get("hidden_states", block.attn.to_q.weight)
        if x.dtype == torch.float16:
            return "its float16 output is clipped"
    return None
