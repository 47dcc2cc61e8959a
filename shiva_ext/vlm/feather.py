"""Visual tokens leave a transformers vision-language model between its layers, and the cache with them."""

import inspect
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from shiva_ext import ops

from .config import FastVConfig, FeatherConfig, Stage, flops_reduction, grid_tokens, square
from .score import attention_of_last

FAMILIES = ("llama", "mistral", "qwen2")  # text models whose layers are known
_HANDLE, _KEPT = "_shiva_ext_feather", "_shiva_ext_kept"


@dataclass
class _Cut:
    """What a stage did to the prompt.

    Attributes:
        kept: int64 [B,n], ascending, among the tokens before it.
        absolute: the same among the prompt's tokens.
        masked: bool [B,n]: visual tokens that only fill up a sample that keeps fewer than another one; nobody looks at
            them. None: there are none.
        length: of the prompt.
    """

    kept: Tensor
    absolute: Tensor
    masked: Tensor | None
    length: int


@dataclass
class _Prompt:
    """The prompt that is being read.

    Attributes:
        image: bool [B,S], the visual tokens among those that are left.
        real: bool [B,S], what is not padding.
        per_image: tokens of one image.
        cuts: what the stages did so far.
        before: hidden states that each stage found, [B,S,D].
        inputs: of the layer before each stage, by its index.
    """

    image: Tensor
    real: Tensor
    per_image: int
    cuts: list[_Cut] = field(default_factory=list)
    before: list[Tensor] = field(default_factory=list)
    inputs: dict[int, Tensor] = field(default_factory=dict)


class FeatherHandle:
    """What :func:`shiva_ext.enable` returns for a vision-language model.

    Attributes:
        model: the hooked model.
        config: its setting.
        kept: of the last prompt, for every stage the visual tokens that it kept, a list [B] of int64 [n_b] each: their
            indices among the visual tokens of the prompt.
        lengths: tokens of the last prompt that each group of layers saw, the whole prompt first.
    """

    def __init__(self, model: nn.Module, config: FeatherConfig, language: nn.Module):
        self.model, self.config, self.language = model, config, language
        self.kept: list[list[Tensor]] = []
        self.lengths: list[int] = []
        self._stages = {stage.layer: stage for stage in config.stages()}
        self._prompt: _Prompt | None = None
        self._slots: Tensor | None = None  # of the visual tokens that are left, the indices among all of the prompt's
        self._hooks: list = []

    def disable(self) -> None:
        """Give the model all of its tokens again. Harmless if done before."""
        while self._hooks:
            self._hooks.pop().remove()
        if getattr(self.model, _HANDLE, None) is self:
            delattr(self.model, _HANDLE)

    def __enter__(self) -> "FeatherHandle":
        return self

    def __exit__(self, *error) -> None:
        self.disable()

    def flops_reduction(self) -> float:
        """The share of the language model's operations that reading the last prompt was spared, text included.

        Raises:
            RuntimeError: no prompt with visual tokens was read yet.
        """
        if not self.lengths:
            raise RuntimeError("shiva_ext: no prompt with visual tokens was read since this was enabled")
        config = self.language.config
        edges = [0, *sorted(self._stages), config.num_hidden_layers]
        groups = [after - before for before, after in pairwise(edges)]
        return flops_reduction(self.lengths, groups, config.hidden_size, config.intermediate_size)

    # ---- hooks

    @property
    def _flash(self) -> bool:
        """Whether attention takes a mask [B,S] of the tokens that are there, and no other."""
        return "flash" in str(self.language.config._attn_implementation)

    def _attach(self) -> None:
        base, first = self.model.model, min(self._stages, default=None)
        if first is None:
            return
        # Bound methods alone: a deepcopy of the model then has hooks of its own handle.
        self._hooks.append(base.register_forward_pre_hook(self._find_images, with_kwargs=True))
        self._hooks.append(base.register_forward_hook(self._forget, always_call=True))
        layers = self.language.layers
        for index in range(first - 1, len(layers)):
            enter = partial(self._enter, index)
            self._hooks.append(layers[index].register_forward_pre_hook(enter, with_kwargs=True))
        self._hooks.append(layers[-1].register_forward_hook(self._restore))

    def _find_images(self, module, args, kwargs) -> None:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        ids, past = given.get("input_ids"), given.get("past_key_values")
        self._prompt = self._slots = None
        started = past is not None and past.get_seq_length() > 0
        embeds = given.get("inputs_embeds")
        length = (ids if ids is not None else embeds).shape[1]
        if started and length > 1 and hasattr(past, _KEPT):
            raise RuntimeError(
                f"shiva_ext: {length} tokens go on from a prompt whose visual tokens were pruned; one at a time is "
                "supported (no assisted generation, no second turn on the same cache)"
            )
        if ids is None and not (started and length == 1):
            raise ValueError("shiva_ext: the visual tokens are found by input_ids, which were not given")
        image = None if ids is None else ids == self.model.config.image_token_id
        if started and (image is None or not image.any()):
            return
        if started:
            raise ValueError(
                "shiva_ext: the picture comes after what the cache holds already; read the whole prompt in one call "
                "(no prefix that is kept, no prefill in chunks)"
            )
        self.kept, self.lengths = [], []
        if hasattr(past, _KEPT):  # emptied and used again
            delattr(past, _KEPT)
        counts = image.sum(dim=1)
        if not counts.any():
            return
        if counts.min() != counts.max():
            raise ValueError(
                f"shiva_ext: the prompts of a batch must have as many visual tokens each, got {counts.tolist()}"
            )
        mask = given.get("attention_mask")
        if self.config.rope and torch.is_tensor(mask) and mask.dim() != 2:
            raise ValueError("shiva_ext: FastV's score needs the padding as a mask [B,S]")
        real = mask.bool() if torch.is_tensor(mask) and mask.dim() == 2 else torch.ones_like(image)
        if not real[:, -1].all():
            raise ValueError("shiva_ext: prompts must be padded on the left: the last token asks for the visual ones")
        self._prompt = _Prompt(image, real, self._per_image(int(counts[0]), len(image), given.get("pixel_values")))
        self.lengths = [image.shape[1]]

    def _per_image(self, count: int, batch: int, pixels: Tensor | None) -> int:
        """Visual tokens of one picture, of so many a prompt; needed for the grid alone."""
        if self.config.grid is not None:
            size = self.config.grid[0] * self.config.grid[1]
        elif torch.is_tensor(pixels) and pixels.dim() == 4 and count * batch % len(pixels) == 0:
            size = count * batch // len(pixels)
        else:
            size = getattr(self.model.config, "image_seq_length", None) or count
        if count % size and self.config.stride:
            raise ValueError(
                f"shiva_ext: a prompt has {count} visual tokens, which are no whole number of pictures of {size}; give "
                "grid=(rows, columns) of one"
            )
        return size

    def _forget(self, module, args, output) -> None:
        self._prompt = self._slots = None

    def _enter(self, index: int, module, args, kwargs):
        """Before a layer: cut the tokens if a stage begins here, and give the layer what goes with those left."""
        stage = self._stages.get(index)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        cache, prompt = kwargs.get("past_key_values", kwargs.get("past_key_value")), self._prompt
        mask = kwargs.get("attention_mask")
        if mask is not None and not torch.is_tensor(mask):
            raise TypeError(
                f"shiva_ext: the attention mask is a {type(mask).__name__}; use sdpa, eager or flash attention"
            )
        if prompt is None:
            cuts = getattr(cache, _KEPT, {}) if cache is not None else {}
            if cut := _last_before(cuts, index):
                kwargs["attention_mask"] = _mask_of_step(mask, cut, cache, hidden, self._flash)
            return (hidden,), kwargs
        if stage is not None:
            hidden = self._cut(stage, hidden, kwargs, cache)
        if index + 1 in self._stages:
            prompt.inputs[index] = hidden
        if prompt.cuts:
            kwargs |= _follow(kwargs, prompt.cuts[-1], hidden, self._flash)
        return (hidden,), kwargs

    def _cut(self, stage: Stage, hidden: Tensor, kwargs: dict, cache) -> Tensor:
        prompt, B = self._prompt, len(hidden)
        if cache is not None and any(getattr(layer, "is_compileable", False) for layer in getattr(cache, "layers", ())):
            raise ValueError("shiva_ext: a static cache has one length for all layers; use transformers' DynamicCache")
        places = prompt.image.nonzero()[:, 1].view(B, -1)
        rope = kwargs["position_embeddings"] if self.config.rope else None
        if rope is not None and prompt.cuts:
            rope = tuple(_rows(each, prompt.cuts[-1].absolute) for each in rope)
        keys = prompt.real if self.config.rope else prompt.image
        before = self.language.layers[stage.layer - 1]
        spare = torch.zeros_like(prompt.image)
        if prompt.cuts and prompt.cuts[-1].masked is not None:
            spare = prompt.cuts[-1].masked
        score = attention_of_last(before, prompt.inputs.pop(stage.layer - 1), places, keys & ~spare, rope)
        chosen, masked = self._choose(stage, score, spare.gather(1, places))
        # Text and visual tokens in their order; the chosen ones are indices among the visual tokens.
        text = (~prompt.image).nonzero()[:, 1].view(B, -1)
        kept, order = torch.cat([text, places.gather(1, chosen)], dim=1).sort(dim=1)
        if masked is not None:
            masked = torch.cat([torch.zeros_like(text, dtype=torch.bool), masked], dim=1).gather(1, order)
        last = prompt.cuts[-1] if prompt.cuts else None
        absolute = kept if last is None else last.absolute.gather(1, kept)
        cut = _Cut(kept, absolute, masked, prompt.image.shape[1] if last is None else last.length)
        self.lengths.append(kept.shape[1])
        prompt.before.append(hidden)
        prompt.cuts.append(cut)
        prompt.image, prompt.real = prompt.image.gather(1, kept), prompt.real.gather(1, kept)
        if cache is not None:
            setattr(cache, _KEPT, getattr(cache, _KEPT, {}) | {stage.layer: cut})
        return ops.token_gather(hidden, kept)

    def _choose(self, stage: Stage, score: Tensor, spare: Tensor) -> tuple[Tensor, Tensor | None]:
        """Which visual tokens stay; each sample decides for itself.

        Args:
            score: [B,n].
            spare: bool [B,n], those that only fill up; they are left again.

        Returns:
            indices int64 [B,m], ascending, and bool [B,m], which of them only fill up a sample; None if none does.
        """
        B, n = score.shape
        wanted = torch.zeros_like(spare)
        for b in range(B):
            top, _ = ops.topk_select(score[b : b + 1], int(stage.share * int((~spare[b]).sum())))
            wanted[b, top[0]] = True
        if stage.stride:
            size = self._prompt.per_image
            rows, columns = square(size, self.config.grid)
            grid = torch.tensor(grid_tokens(rows, columns, stage.stride), device=score.device)
            wanted[:, torch.cat([grid + first for first in range(0, n, size)])] = True
        self._note(wanted)
        chosen, _ = ops.topk_select(score.masked_fill(wanted, float("inf")), int(wanted.sum(dim=1).max()))
        extra = ~wanted.gather(1, chosen)
        self._slots = chosen if self._slots is None else self._slots.gather(1, chosen)
        return chosen, extra if extra.any() else None

    def _note(self, wanted: Tensor) -> None:
        """Add a stage to ``kept``, as indices among the visual tokens of the prompt."""
        all_of_them = torch.arange(wanted.shape[1], device=wanted.device).expand(wanted.shape)
        names = all_of_them if self._slots is None else self._slots
        self.kept.append([own[mine] for own, mine in zip(names, wanted, strict=True)])

    def _restore(self, module, args, output):
        """All tokens again after the last layer: those that left have the hidden state they left with."""
        prompt = self._prompt
        if prompt is None or not prompt.cuts:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        for before, cut in zip(reversed(prompt.before), reversed(prompt.cuts), strict=True):
            hidden = ops.token_scatter(before, cut.kept, hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _last_before(cuts: dict[int, _Cut], index: int) -> _Cut | None:
    begun = [layer for layer in cuts if layer <= index]
    return cuts[max(begun)] if begun else None


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a position table [B or 1,S,d] at the indices [B,n]."""
    return table.expand(len(index), -1, -1).gather(1, index.unsqueeze(-1).expand(-1, -1, table.shape[-1]))


def _follow(kwargs: dict, cut: _Cut, hidden: Tensor, flash: bool) -> dict:
    """A layer's further arguments for the tokens that are left: their own positions, their part of the mask."""
    index, changed = cut.absolute, {}
    changed["position_embeddings"] = tuple(_rows(each, index) for each in kwargs["position_embeddings"])
    if torch.is_tensor(kwargs.get("position_ids")):
        changed["position_ids"] = kwargs["position_ids"].expand(len(index), -1).gather(1, index)
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.dim() == 4:
        rows = index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1])
        mask = mask.expand(len(index), -1, -1, -1).gather(2, rows)
        columns = index[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1)
        mask = mask.gather(3, columns)
    elif mask is not None:
        mask = mask.gather(1, index)
    elif cut.masked is not None and flash:  # which takes the tokens that are there
        mask = torch.ones_like(index)
    elif cut.masked is not None:
        n = index.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool, device=index.device).tril()[None, None].expand(len(index), 1, n, n)
        mask = _as_bias(mask, hidden)
    changed["attention_mask"] = _hide(mask, cut.masked)
    return changed


def _mask_of_step(mask: Tensor | None, cut: _Cut, cache, hidden: Tensor, flash: bool) -> Tensor | None:
    """The mask of one new token for a layer whose cache has the kept part of the prompt, and all that came after it."""
    masked, index = cut.masked, cut.absolute
    if mask is None:
        if masked is None:
            return None
        total = cache.get_seq_length(0) - cut.length + index.shape[1]
        mask = torch.ones(len(index), 1, 1, total, dtype=torch.bool, device=index.device)
        mask = mask[:, 0, 0].long() if flash else _as_bias(mask, hidden)
    else:
        shape = (-1, mask.shape[1], mask.shape[2], -1) if mask.dim() == 4 else (-1, -1)
        mask = mask.expand(len(index), *mask.shape[1:])
        columns = (index[:, None, None] if mask.dim() == 4 else index).expand(*shape)
        mask = torch.cat([mask.gather(-1, columns), mask[..., cut.length :]], dim=-1)
    if masked is not None:
        masked = nn.functional.pad(masked, (0, mask.shape[-1] - masked.shape[1]))
    return _hide(mask, masked)


def _as_bias(allowed: Tensor, hidden: Tensor) -> Tensor:
    """What is added to the logits: eager attention takes no bool."""
    return torch.zeros(allowed.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(
        ~allowed, torch.finfo(hidden.dtype).min
    )


def _hide(mask: Tensor | None, masked: Tensor | None) -> Tensor | None:
    """The mask without the columns [B,n] that nobody may look at."""
    if mask is None or masked is None:
        return mask
    columns = masked[:, None, None] if mask.dim() == 4 else masked
    if mask.dtype == torch.bool or not mask.is_floating_point():
        return mask & ~columns if mask.dtype == torch.bool else mask * ~columns
    return mask.masked_fill(columns, torch.finfo(mask.dtype).min)


def language_model(model: nn.Module) -> nn.Module:
    """The text model inside a vision-language model of transformers.

    Raises:
        TypeError: there is none, or its layers are not known.
    """
    name, base = type(model).__name__, getattr(model, "model", None)
    language = getattr(base, "language_model", None)
    if language is None or not hasattr(model.config, "image_token_id"):
        raise TypeError(
            f"shiva_ext: {name} is no vision-language model of transformers that is known: wanted one such as "
            "LlavaForConditionalGeneration, with model.language_model and config.image_token_id; of a model with "
            "PEFT's adapters, get_base_model()"
        )
    kind = language.config.model_type
    if kind not in FAMILIES:
        raise TypeError(f"shiva_ext: {name} has a {kind} text model; known are {', '.join(FAMILIES)}")
    types = set(getattr(language.config, "layer_types", None) or ["full_attention"])
    if types != {"full_attention"} or (kind == "mistral" and language.config.sliding_window):
        raise TypeError(f"shiva_ext: {name} has layers with a sliding window, which pruned tokens would shift")
    return language


def is_vlm(model) -> bool:
    """Whether this is a model for which :func:`enable_feather` is meant."""
    return isinstance(model, nn.Module) and hasattr(getattr(model, "model", None), "language_model")


def enable_feather(model: nn.Module, config: FeatherConfig | FastVConfig) -> FeatherHandle:
    """Prune the visual tokens of a vision-language model; see :func:`shiva_ext.enable`, which calls this.

    Prompts are read with fewer and fewer visual tokens, each with its own position; the layers' caches hold what they
    saw, and ``generate`` goes on from there. Text is never dropped. Hidden states at the end have all tokens again:
    a pruned one has what it left with.

    Raises:
        TypeError: not a known model.
        ValueError: a stage's layer is not there.
    """
    language = language_model(model)
    wanted = config.feather() if isinstance(config, FastVConfig) else config
    if max(wanted.layers) >= len(language.layers):
        raise ValueError(f"shiva_ext: layers is {wanted.layers}, but the model has {len(language.layers)} layers")
    if (old := get_feather(model)) is not None:
        old.disable()
    handle = FeatherHandle(model, wanted, language)
    handle._attach()
    setattr(model, _HANDLE, handle)
    return handle


def get_feather(model: nn.Module) -> FeatherHandle | None:
    """The handle on a model, if it has one."""
    return getattr(model, _HANDLE, None)
