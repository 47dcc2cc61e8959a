"""The rows of the testbed's table, and how each puts its method on the model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from diffusers import SD3Transformer2DModel

import shiva_ext

from .. import methods
from ..methods.base import site_tokens
from ..selection.baselines import LargestNormSelector, RandomSelector
from .model import ASSETS
from .sampling import EULER, STEPS


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: as printed.
        method: key of :data:`METHODS`, which says how the model is changed.
        source: what the method needs: an artefact's folder (relative to the package's assets), or a selector's name.
        ratio: share of image tokens to keep, for the methods that are told; an artefact follows its own table.
        steps: Euler steps.
        equal_time_as: name of another row; the steps are then cut to the time that this one takes.
        repeat: over all seeds of the report, not only the first.
        group: rows of one group share a colour in the plot.
        options: further settings of the method, as pairs of a name and a value: of a method of
            :mod:`shiva_ext.methods` its own, trained or not, of the others those of :func:`shiva_ext.enable`.
        guidance: scale, where it is not the testbed's: 1 of an artefact that has learned it.
        solver: of :func:`~.sampling.generate`.
        cache: name of a cache of :mod:`.cached_rows` and its strength, if there is one beside the method.
    """

    name: str
    method: str = "dense"
    source: str = ""
    ratio: float = 1.0
    steps: int = STEPS
    equal_time_as: str = ""
    repeat: bool = False
    group: str = "dense"
    options: tuple[tuple[str, object], ...] = ()
    cache: tuple[str, float] | None = None
    solver: str = EULER
    guidance: float | None = None


ROWS = (
    Row("dense", repeat=True),
    Row("dense fine-tuned", "artefact", "dense_finetuned", repeat=True),
    Row("Shiva 80 %", "artefact", "shiva80", 0.8, repeat=True, group="shiva"),
    Row("Shiva 60 %", "artefact", "shiva60", 0.6, repeat=True, group="shiva"),
    Row("Shiva 60 %, one choice a pair", "artefact, shared choice", "shiva60", 0.6, group="shiva"),
    Row("fixed ratio 60 %", "artefact at ratio", "shiva60", 0.6, group="other"),
    Row("random tokens 60 %", "selector", "random", 0.6, group="other"),
    Row("largest-norm tokens 60 %", "selector", "largest_norm", 0.6, group="other"),
    Row("fewer steps, time of Shiva 60 %", equal_time_as="Shiva 60 %"),
)


class Method(Protocol):
    """What a setup of :data:`METHODS` returns.

    Attributes:
        router_width: hidden width of the router that scores every token of a pruned layer; 0 without one.
        measured: whether its operations are to be counted as it runs, because they follow from weights and image.
    """

    router_width: int
    measured: bool

    def work(self, dim: int, tokens: int) -> list[tuple[dict, int]]:
        """Of each recorded call: what each layer that is not dense processes, as
        :func:`~shiva_ext.evaluation.flops.sd3_forward_flops` takes it, and operations besides."""

    def record(self, on: bool) -> None:
        """Start afresh to record kept tokens, or stop."""

    def kept_tokens(self) -> list[dict[int, torch.Tensor]]:
        """One dict a transformer call since ``record(True)``: pruned layer to kept indices int64 [B, k]."""

    def disable(self) -> None:
        """Take the method off the model."""


class Dense:
    """The model as it is."""

    router_width, measured = 0, False

    def work(self, dim: int, tokens: int) -> list[tuple[dict, int]]:
        return []

    def record(self, on: bool) -> None:
        pass

    def kept_tokens(self) -> list[dict[int, torch.Tensor]]:
        return []

    def disable(self) -> None:
        pass


class Enabled:
    """A method put on by :func:`shiva_ext.enable`."""

    def __init__(self, transformer: SD3Transformer2DModel, source, **overrides):
        self.handle = shiva_ext.enable(transformer, source, **overrides)
        router = getattr(self.handle.state.selector, "router", None)
        self.router_width = 0 if router is None else router.config.hidden
        self.measured = isinstance(self.handle.state.method, methods.TrainedMethod)

    def work(self, dim: int, tokens: int) -> list[tuple[dict, int]]:
        found, method = [], self.handle.state.method
        for record in self.handle.records:
            counts = {layer: index.shape[1] for layer, index in record["kept"].items()}
            if method is None:
                found.append((counts, 0))
            else:
                sites = {layer: tuple(site_tokens(record["sites"][layer], tokens, M)) for layer, M in counts.items()}
                found.append((sites, len(sites) * method.matching_flops(tokens, dim)))
        return found

    def record(self, on: bool) -> None:
        self.handle.record(on)

    def kept_tokens(self) -> list[dict[int, torch.Tensor]]:
        return [record["kept"] for record in self.handle.records]

    def disable(self) -> None:
        self.handle.disable()


def _selector(row: Row):
    selectors = {"random": RandomSelector, "largest_norm": LargestNormSelector}
    if row.source not in selectors:
        raise ValueError(f"row {row.name!r}: source must be one of {', '.join(selectors)}, got {row.source!r}")
    return selectors[row.source](ratio=row.ratio)


def _method(transformer: SD3Transformer2DModel, row: Row, guided: bool) -> Method:
    if row.source not in methods.METHODS:
        raise ValueError(f"row {row.name!r}: source must be one of {', '.join(methods.METHODS)}, got {row.source!r}")
    return Enabled(transformer, methods.METHODS[row.source](**dict(row.options)), batched_guidance=guided)


def _artefact(transformer: SD3Transformer2DModel, row: Row, guided: bool) -> Method:
    options = {"batched_guidance": guided} | dict(row.options)
    if "tuned" in options:
        options["tuned"] = ASSETS / options["tuned"]
    return Enabled(transformer, ASSETS / row.source, **options)


def _trained(transformer: SD3Transformer2DModel, row: Row, guided: bool) -> Method:
    artifact = shiva_ext.MethodArtifact.load(ASSETS / row.source).with_settings(**dict(row.options))
    return Enabled(transformer, artifact, batched_guidance=guided)


def _artefact_at_ratio(transformer: SD3Transformer2DModel, row: Row, guided: bool) -> Method:
    return Enabled(transformer, ASSETS / row.source, ratio=row.ratio, batched_guidance=guided)


def _artefact_shared(transformer: SD3Transformer2DModel, row: Row, guided: bool) -> Method:
    return Enabled(transformer, ASSETS / row.source, share_selection=True, batched_guidance=guided)


def _baseline(transformer: SD3Transformer2DModel, row: Row, guided: bool) -> Method:
    return Enabled(transformer, _selector(row), batched_guidance=guided, **dict(row.options))


# How a row's method is put on a transformer: setup(transformer, row, guided), guided as in generate's batches.
METHODS: dict[str, Callable[[SD3Transformer2DModel, Row, bool], Method]] = {
    "dense": lambda transformer, row, guided: Dense(),
    "artefact": _artefact,
    "artefact at ratio": _artefact_at_ratio,
    "artefact, shared choice": _artefact_shared,
    "artefact of a method": _trained,
    "selector": _baseline,
    "method": _method,
}


def artefact_folder(row: Row) -> Path | None:
    """The folder that a row's method loads, if it loads one."""
    return ASSETS / row.source if row.method.startswith("artefact") else None
