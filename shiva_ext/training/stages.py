"""One pruned training pass: dense teacher first, then the student with the estimator in its blocks."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from shiva_ext.selection import Estimator
from shiva_ext.selection_state import SelectionState


@dataclass
class Teacher:
    """The dense model's run: its output, and each hooked block's input and output tokens [B,N,D]."""

    output: Tensor
    tokens: dict[int, tuple[Tensor, Tensor]]

    def update(self, layer: int) -> Tensor:
        """What the block adds on the teacher's own trajectory."""
        before, after = self.tokens[layer]
        return after - before


@contextmanager
def adapters_off(model: nn.Module):
    """Run a model without its PEFT adapters."""
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def run_teacher(transformer: nn.Module, state: SelectionState, **inputs) -> Teacher:
    """The frozen dense model on the same inputs: hooks idle, adapters off."""
    state.active, state.captured = False, {}
    try:
        with adapters_off(transformer):
            output = transformer(**inputs, return_dict=False)[0]
        return Teacher(output, state.captured)
    finally:
        state.active, state.captured = True, None


class StudentPass:
    """Takes over every hooked block for one training call; set as ``SelectionState.trainer``.

    Args:
        state: of the hooks.
        estimator: sends the gradient to scores and ratios.
        ratios: [L], this call's ratio per layer; may require a gradient.
        teacher: of the same inputs, for estimators that need its updates.

    Attributes:
        finite: whether all scores were.
        outputs: image tokens [B,N,D] after each hooked block, by layer.
        kept: indices [B,k] by layer.
    """

    def __init__(self, state: SelectionState, estimator: Estimator, ratios: Tensor, teacher: Teacher | None):
        self.state, self.estimator, self.teacher = state, estimator, teacher
        self.ratios = self._together(ratios)
        self.counts = self.ratios.detach().tolist()
        self.scores: dict[int, tuple[int, Tensor]] = {}  # of layers that select together: the first one, and its scores
        self.outputs: dict[int, Tensor] = {}
        self.kept: dict[int, Tensor] = {}
        self.finite = True  # whether all scores were; looked at where it costs no synchronisation

    def _together(self, ratios: Tensor) -> Tensor:
        """Layers that select together keep the mean of their ratios."""
        first = self.state.selector.first_layer
        groups = [None if i < first else self.state.group(i) for i in range(len(ratios))]
        if not any(group is not None for group in groups):
            return ratios
        members = [[j for j, other in enumerate(groups) if other == group] for group in groups]
        return torch.stack([ratios[i] if groups[i] is None else ratios[members[i]].mean() for i in range(len(ratios))])

    def _scores(self, layer: int, x: Tensor) -> Tensor:
        """The router learns from the estimator alone: its input carries no gradient back into the backbone."""
        group = self.state.group(layer)
        first, scores = self.scores.get(group, (layer, None))
        if first == layer:  # also when gradient checkpointing runs it again
            scores = self.state.selector.scores(layer, x.detach(), 0.0, self.state.conditioning)
            if scores.device.type == "cpu" and not torch.isfinite(scores).all():
                self.finite = False  # the pass goes on: other processes wait for its messages
                scores = torch.nan_to_num(scores)
            if group is not None:  # one draw of the exploration noise for all layers of the group
                scores = self.estimator.perturb(scores)
        if group is not None:
            self.scores[group] = first, scores
        return scores

    def run_block(self, layer: int, x: Tensor, run):
        """Called by the block's hook with its image tokens; ``run`` is the block on given tokens, with their index."""
        N, adapter = x.shape[1], self.state.adapter
        k = min(max(int(N * self.counts[layer]), 1), N)
        scores, noisy = self._scores(layer, x), self.state.group(layer) is None
        output = None

        def block(tokens: Tensor, kept: Tensor) -> Tensor:
            nonlocal output
            output = run(tokens, kept)
            return adapter.image_tokens(output)

        update = self.teacher.update(layer) if self.estimator.needs_update else None
        y, self.kept[layer] = self.estimator.apply(
            block, x, scores, N * self.ratios[layer], k, update, with_index=True, noisy=noisy
        )
        self.outputs[layer] = y
        return adapter.with_image_tokens(output, y)


def run_student(
    transformer: nn.Module,
    state: SelectionState,
    estimator: Estimator,
    ratios: Tensor,
    teacher: Teacher | None,
    **inputs,
) -> tuple[Tensor, StudentPass]:
    """The pruned model with gradients; returns its output and the pass's record."""
    student = StudentPass(state, estimator, ratios, teacher)
    state.trainer = student
    try:
        return transformer(**inputs, return_dict=False)[0], student
    finally:
        state.trainer = None
