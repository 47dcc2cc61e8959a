"""The interface of an adapter, and the registry of model families."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import NamedTuple

from diffusers.hooks import ModelHook
from torch import Tensor, nn

from .fused import FusedForm


class Conditioning(NamedTuple):
    """What the backbone itself knows of the step and the prompt."""

    timestep: Tensor  # [B]
    timestep_embedding: Tensor  # [B, temb_dim]
    pooled_embedding: Tensor  # [B, pooled_dim]


class ModelAdapter(ABC):
    """Says where a family's blocks take their image tokens and where they give them back.

    Attributes:
        model_class: name of the transformer's class.
        image_argument: name of the block argument that holds the image tokens [B,N,D].
        image_output: their position in the block's output tuple; None if the block returns them alone.
        row_arguments: of the block, tensors with a row for each sample.
        shared_arguments: of the block, what is the same for all samples.
        guides_in_batch: whether the family's pipelines guide with one call for both prompts; others make two calls.
        prompted_first: whether the prompted half of such a batch is the first.
    """

    model_class: str
    image_argument: str = "hidden_states"
    image_output: int | None = None
    row_arguments: tuple[str, ...] = ("hidden_states", "encoder_hidden_states", "temb")
    shared_arguments: tuple[str, ...] = ()
    guides_in_batch: bool = True
    prompted_first: bool = False

    @abstractmethod
    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        """The prunable blocks in their order; layer numbers are positions in this list."""

    @abstractmethod
    def dims(self, transformer: nn.Module) -> dict[str, int]:
        """``dim``, ``temb_dim``, ``pooled_dim`` and ``num_layers``, as a router is configured with."""

    @abstractmethod
    def num_tokens(self, transformer: nn.Module) -> int:
        """Image tokens N at the size that the model's configuration names."""

    def inner_hooks(self, block: nn.Module) -> list[tuple[nn.Module, ModelHook]]:
        """Modules inside a prunable block that must know of the selection, each with a hook of its own."""
        return []

    def merge_sites(self, block: nn.Module) -> dict[str, list[nn.Module]]:
        """The modules that take and return the image tokens alone, by site: "attention", "mlp", its "mlp_norm".

        Their first argument is ``hidden_states``; it is also what they return, or the first part of it. Empty where a
        module's tokens have places of their own (rotary positions, a convolution), so that only whole blocks can merge.
        """
        return {}

    def cache_sites(self, block: nn.Module) -> dict[str, list[tuple[nn.Module, tuple[str, ...]]]]:
        """The modules of a block that do its work, by kind: "attention", "cross_attention", "mlp".

        Each with what the tensors that it gives hold: "image" tokens, "text" tokens, "joint", text before image, or a
        "map" of image tokens, [B,C,H,W]. Its first argument is ``hidden_states``, of the shape of its image tokens.

        Raises:
            TypeError: the family's adapter does not say.
        """
        raise TypeError(f"shiva_ext: {type(self).__name__} does not say which modules a cache can keep")

    def modulated_input(self, block: nn.Module, x: Tensor, arguments: dict) -> Tensor:
        """The image tokens x [B,N,D] at the first block's entry, normalised and modulated by the step.

        Args:
            block: the first one.
            arguments: its call's, by name.

        Raises:
            TypeError: the family's adapter does not say.
        """
        raise TypeError(f"shiva_ext: {type(self).__name__} does not say how its first block modulates its input")

    def rows_of(self, arguments: dict, rows: Tensor) -> dict | None:
        """A block's arguments for some samples of the batch, int64 [b]; None if it is not known whose they are."""
        B, narrowed = len(arguments[self.image_argument]), {}
        for name, value in arguments.items():
            if isinstance(value, Tensor) and name in self.row_arguments and len(value) in (1, B):
                narrowed[name] = value if len(value) == 1 and B > 1 else value.index_select(0, rows)
            elif value is None or isinstance(value, (bool, int, float)) or value == {} or name in self.shared_arguments:
                narrowed[name] = value
            else:
                return None
        return narrowed

    def grid(self, transformer: nn.Module, arguments: dict) -> tuple[int, int]:
        """Height and width of a call's image in tokens.

        Raises:
            TypeError: the family's tokens are no image, or the call does not tell.
        """
        latents, patch = arguments["hidden_states"], getattr(transformer.config, "patch_size", None)
        if latents.ndim != 4 or not isinstance(patch, int):
            raise TypeError(
                f"shiva_ext: {type(transformer).__name__} is not called with an image [B,C,H,W], so there are no rows "
                "and columns of tokens to work with; this method is not for it"
            )
        return latents.shape[2] // patch, latents.shape[3] // patch

    def token_costs(self, transformer: nn.Module) -> list[int]:
        """Relative cost of an image token in each block, as small positive integers; all alike unless overridden."""
        return [1] * len(self.blocks(transformer))

    @abstractmethod
    def forward_flops(
        self,
        transformer: nn.Module,
        text_tokens: int,
        image_tokens: int | None = None,
        kept: Mapping[int, int] | None = None,
        router_width: int = 0,
        scored: Collection[int] | None = None,
    ) -> int:
        """Operations of one sample's forward pass; see :mod:`shiva_ext.evaluation.flops`."""

    @abstractmethod
    def conditioning(self, transformer: nn.Module, arguments: dict) -> Conditioning:
        """The embeddings of a forward call with these named arguments."""

    def batched_guidance(self, arguments: dict, pipeline_guides: bool) -> bool:
        """Whether this call's batch is the unconditional half followed by the conditional one."""
        return pipeline_guides

    def call(self, forward, tokens: Tensor, args: tuple, kwargs: dict, kept: Tensor | None = None):
        """Run a block on these image tokens [B,k,D] in place of its own; kept [B,k] says which they are.

        None is all of them. A family whose blocks get positions apart from the tokens narrows them here.
        """
        if self.image_argument in kwargs:
            return forward(*args, **{**kwargs, self.image_argument: tokens})
        return forward(tokens, *args[1:], **kwargs)

    def call_fused(self, form: FusedForm, block: nn.Module, x: Tensor, kept: Tensor, arguments: dict):
        """Run a block's fused form on the kept [B,k] of all tokens x [B,N,D]; the output has all N."""
        return form.run(block, x, kept, arguments)

    @staticmethod
    def bind(forward, args: tuple, kwargs: dict) -> dict:
        """Positional and keyword arguments of a call by name."""
        names = [p for p in inspect.signature(forward).parameters if p != "self"]
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def image_tokens(self, output):
        """The image tokens in a block's output."""
        return output if self.image_output is None else output[self.image_output]

    def with_image_tokens(self, output, tokens: Tensor):
        """A block's output with its image tokens replaced."""
        if self.image_output is None:
            return tokens
        return (*output[: self.image_output], tokens, *output[self.image_output + 1 :])


ADAPTERS: dict[str, type[ModelAdapter]] = {}


def register(adapter: type[ModelAdapter]) -> type[ModelAdapter]:
    """Class decorator: makes an adapter known by its ``model_class``."""
    ADAPTERS[adapter.model_class] = adapter
    return adapter


def adapter_for(transformer: nn.Module) -> ModelAdapter:
    """The adapter of a transformer, by the name of its class or of one it inherits from.

    Raises:
        TypeError: the family is unknown; the message lists those that are known.
    """
    for cls in type(transformer).__mro__:
        if cls.__name__ in ADAPTERS:
            return ADAPTERS[cls.__name__]()
    raise TypeError(
        f"shiva_ext has no adapter for {type(transformer).__name__}; it knows {', '.join(sorted(ADAPTERS))}. "
        "A new family is one small class in shiva_ext/models, see CONTRIBUTING.md"
    )
