"""What each estimator tells a router's scores: against the truth, from draw to draw, and what it costs by length."""

import statistics
import time

import torch
from torch import Tensor, nn

from shiva_ext import hooks
from shiva_ext.models import adapter_for
from shiva_ext.selection import ESTIMATORS, Estimator, get_estimator
from shiva_ext.training.stages import run_student, run_teacher

PROGRESS = (0.0, 0.5, 1.0)
DRAWS = 8
LENGTHS = (256, 1024, 4096)
_SLOW = {"subset": 1024, "neuralsort": 4096}  # longest that is timed


class _Given:
    """A selector whose scores [B,N] are given, by layer."""

    first_layer = 1

    def __init__(self, scores: dict[int, Tensor]):
        self.given = {layer: s.clone().requires_grad_() for layer, s in scores.items()}

    def scores(self, layer: int, x: Tensor, sigma: float, conditioning) -> Tensor:
        return self.given[layer]


def score_gradients(
    transformer: nn.Module, inputs: dict, scores: dict[int, Tensor], ratio: float, estimator: Estimator
) -> dict[int, Tensor]:
    """dL/ds of every pruned layer, [B,N]: L is the squared distance of the output to the dense model's.

    Args:
        transformer: a dense model, float32, in eval mode.
        inputs: its forward's arguments for B samples.
        scores: by layer float32 [B,N].
        ratio: share of tokens kept.
        estimator: sends the gradient.
    """
    selector = _Given(scores)
    state = hooks.SelectionState(selector, adapter_for(transformer))
    ratios = torch.tensor([1.0] + [ratio] * len(scores))
    hooks.attach(transformer, state)
    try:
        teacher = run_teacher(transformer, state, **inputs)
        output, _ = run_student(transformer, state, estimator, ratios, teacher, **inputs)
        (output - teacher.output).square().flatten(1).mean(1).sum().backward()
    finally:
        hooks.detach(transformer)
    return {layer: s.grad for layer, s in selector.given.items()}


def _correlations(gradient: dict[int, Tensor], truth: dict[int, Tensor]) -> tuple[float, float]:
    """Mean over layers and samples of Pearson's and Spearman's correlation with the truth."""
    found = []
    for layer, wanted in truth.items():
        for mine, theirs in zip(gradient[layer].double(), wanted.double(), strict=True):
            pairs = ((mine, theirs), (mine.argsort().argsort().double(), theirs.argsort().argsort().double()))
            says = mine.std() > 0  # a row without a gradient says nothing
            found.append([torch.corrcoef(torch.stack(pair))[0, 1].item() if says else 0.0 for pair in pairs])
    return tuple(statistics.fmean(column) for column in zip(*found, strict=True))


def _spread(draws: list[dict[int, Tensor]]) -> float:
    """Variance of a gradient from draw to draw, as a share of its mean's square."""
    total = square = 0.0
    for layer in draws[0]:
        stacked = torch.stack([draw[layer] for draw in draws]).double()
        total += stacked.var(dim=0).sum().item()
        square += stacked.mean(dim=0).square().sum().item()
    return total / max(square, 1e-30)


def agreement(transformer: nn.Module, inputs: dict, result: dict, ratio: float, names=tuple(ESTIMATORS)) -> dict:
    """Each estimator at the end of its temperatures that suits it best.

    Args:
        transformer, inputs, ratio: see :func:`score_gradients`.
        result: of :func:`shiva_ext.bench.estimators.probe`: its scores and the truth at their choice.
        names: of estimators.

    Returns:
        ``{name: {"pearson", "spearman", "progress", "variance"}}``: correlation of dL/ds with the true change of the
        loss by processing a token (both less their mean, which a relaxation of a fixed budget does not see), at which
        progress of the annealing, and the variance over draws of the noise there.
    """
    table = {}
    for name in names:
        found = []
        for progress in PROGRESS:
            estimator = get_estimator(name, noise_fraction=0.0, generator=torch.Generator().manual_seed(0))
            estimator.progress = progress
            gradient = score_gradients(transformer, inputs, result["scores"], ratio, estimator)
            found.append((*_correlations(gradient, result["truth"]), progress))
        pearson, spearman, progress = max(found)
        draws = []
        for seed in range(DRAWS):
            estimator = get_estimator(name, generator=torch.Generator().manual_seed(seed))
            estimator.progress = progress
            draws.append(score_gradients(transformer, inputs, result["scores"], ratio, estimator))
        table[name] = dict(pearson=pearson, spearman=spearman, progress=progress, variance=_spread(draws))
    return table


def cost(name: str, N: int, ratio: float = 0.6, B: int = 2, D: int = 64, repeats: int = 5) -> dict[str, float] | None:
    """Milliseconds of an estimator around a block that does nothing, forward and backward, and what it keeps between.

    None for a length at which an estimator's memory or time is out of proportion.
    """
    longest = next((limit for prefix, limit in _SLOW.items() if name.startswith(prefix)), N)
    if N > longest:
        return None
    generator = torch.Generator().manual_seed(0)
    x, scores = torch.randn(B, N, D, generator=generator), torch.randn(B, N, generator=generator)
    update, estimator, times = torch.randn(B, N, D, generator=generator), get_estimator(name), []
    kept_bytes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept_bytes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    for _ in range(repeats + 1):
        kept_bytes.clear()
        tokens, keys = x.clone().requires_grad_(), scores.clone().requires_grad_()
        started = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            k = torch.tensor(N * ratio, requires_grad=True)
            y, _ = estimator.apply(lambda t: t * 1.0, tokens, keys, k, int(N * ratio), update)
        y.sum().backward()
        times.append(time.perf_counter() - started)
    return dict(milliseconds=1e3 * statistics.median(times[1:]), saved_megabytes=sum(kept_bytes.values()) / 1e6)
