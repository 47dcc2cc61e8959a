"""What does processing one token change? Every token is flipped, and each estimator's answer compared with the truth.

For token i of a pruned layer the true value is c_i = L(i processed) - L(i skipped), all other choices fixed. All layers
from the second on are pruned at once, to a random 60 %, and each is probed. A case is one (image, noise level, layer).
The loss is the squared distance of the output to the dense teacher's, as in distillation.
"""

import json
import os
import statistics
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

from shiva_ext import hooks, ops
from shiva_ext.models import adapter_for
from shiva_ext.selection import CounterfactualEstimator, RandomSelector, ResidualEstimator
from shiva_ext.training.stages import Teacher, run_teacher

from .score_gradients import LENGTHS, agreement, cost

GROUPS = ("all", "kept", "rejected")


class _Choice:
    """Runs every pruned block on given tokens: ``kept[layer]`` [B,k]; with an estimator its inclusion's gradient."""

    def __init__(
        self, state: hooks.SelectionState, kept: dict[int, Tensor], estimator=None, teacher: Teacher | None = None
    ):
        self.state, self.kept, self.estimator, self.teacher = state, kept, estimator, teacher
        self.inclusion: dict[int, Tensor] = {}

    def run_block(self, layer: int, x: Tensor, run):
        adapter, kept = self.state.adapter, self.kept[layer]
        if self.estimator is None:
            output = run(ops.token_gather(x, kept), kept)
            return adapter.with_image_tokens(output, ops.token_scatter(x, kept, adapter.image_tokens(output)))
        output = None

        def block(tokens: Tensor) -> Tensor:
            nonlocal output
            output = run(tokens, kept)
            return adapter.image_tokens(output)

        B, N, _ = x.shape
        rejected = torch.ones(B, N, dtype=torch.bool).scatter_(1, kept, False).nonzero()[:, 1].view(B, -1)
        self.inclusion[layer] = torch.zeros(B, N, requires_grad=True)
        update = self.teacher.update(layer) if self.teacher is not None else torch.zeros_like(x)
        y = self.estimator._run(block, x, self.inclusion[layer], kept, rejected, update)
        return adapter.with_image_tokens(output, y)


def _losses(transformer, state, choice: _Choice, target: Tensor, inputs: dict) -> Tensor:
    """Squared distance to the teacher's output, one value per sample [B]."""
    state.trainer = choice
    try:
        output = transformer(**inputs, return_dict=False)[0]
    finally:
        state.trainer = None
    return (output - target).square().flatten(1).mean(1)


def _repeat(inputs: dict, row: int, count: int) -> dict:
    return {k: v[row : row + 1].expand(count, *v.shape[1:]) for k, v in inputs.items()}


@torch.no_grad()
def _true_values(transformer, state, N, kept, layer, target, inputs, base: Tensor, batch_size: int) -> Tensor:
    """c [B,N] of one layer, by one forward pass per token."""
    B, k = kept[layer].shape
    result = torch.empty(B, N)
    for row in range(B):
        chosen = torch.zeros(N, dtype=torch.bool)
        chosen[kept[layer][row]] = True
        for group in (chosen.nonzero()[:, 0], (~chosen).nonzero()[:, 0]):
            for tokens in group.split(batch_size):
                masks = chosen.repeat(len(tokens), 1)
                masks[torch.arange(len(tokens)), tokens] ^= True
                flipped = {other: index[row : row + 1].expand(len(tokens), -1) for other, index in kept.items()}
                flipped[layer] = masks.nonzero()[:, 1].view(len(tokens), -1)
                changed = _losses(
                    transformer,
                    state,
                    _Choice(state, flipped),
                    target[row : row + 1],
                    _repeat(inputs, row, len(tokens)),
                )
                result[row, tokens] = torch.where(chosen[tokens], base[row] - changed, changed - base[row])
    return result


def _cosine(a: Tensor, b: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0).item()


def _spearman(a: Tensor, b: Tensor) -> float:
    ranks = [t.argsort().argsort().double() for t in (a, b)]
    return _cosine(*(rank - rank.mean() for rank in ranks))


def probe(
    transformer: nn.Module, inputs: dict, ratio: float = 0.6, seed: int = 0, batch_size: int = 64
) -> dict[str, dict[str, Tensor]]:
    """Truth and estimates for every token of every pruned layer.

    Args:
        transformer: a dense model of a known family, float32, in eval mode.
        inputs: its forward's arguments for B samples.
        ratio: share of tokens kept, at random, in each pruned layer.
        seed: of the random choice.
        batch_size: flips at a time.

    Returns:
        ``{"scores" | "kept_mask" | "truth" | estimate's name: {layer: [B,N]}}``.
    """
    adapter = adapter_for(transformer)
    layers = range(1, len(adapter.blocks(transformer)))
    state = hooks.SelectionState(RandomSelector(ratio, seed), adapter)
    result: dict[str, dict] = {"kept_mask": {}, "truth": {}, "scores": {}}
    hooks.attach(transformer, state)
    try:
        teacher = run_teacher(transformer, state, **inputs)
        B, N, _ = teacher.tokens[1][0].shape
        generator = torch.Generator().manual_seed(seed)
        kept = {}
        for layer in layers:
            scores = result["scores"][layer] = torch.randn(B, N, generator=generator)
            kept[layer] = ops.topk_select(scores, int(N * ratio))[0]
            result["kept_mask"][layer] = torch.zeros(B, N, dtype=torch.bool).scatter_(1, kept[layer], True)
        estimates = {
            "eq. 7 (residual)": (ResidualEstimator(), None),
            "update gating, kept only": (CounterfactualEstimator(kappa=0.0), None),
            "+ teacher update": (CounterfactualEstimator(kappa=0.0), teacher),
            "+ curvature (counterfactual)": (CounterfactualEstimator(), teacher),
        }
        for name, (estimator, source) in estimates.items():
            choice = _Choice(state, kept, estimator, source)
            _losses(transformer, state, choice, teacher.output, inputs).sum().backward()
            result[name] = {layer: choice.inclusion[layer].grad for layer in layers}
        result["-|u|^2"] = {layer: -teacher.update(layer).square().sum(-1) for layer in layers}
        result["-|x|^2"] = {layer: -teacher.tokens[layer][0].square().sum(-1) for layer in layers}
        with torch.no_grad():
            base = _losses(transformer, state, _Choice(state, kept), teacher.output, inputs)
        for layer in tqdm(layers, desc="flipping tokens", leave=False):
            result["truth"][layer] = _true_values(
                transformer, state, N, kept, layer, teacher.output, inputs, base, batch_size
            )
    finally:
        hooks.detach(transformer)
    return result


def compare(result: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """Mean over the cases of cosine and Spearman correlation with the truth: all tokens, kept, rejected."""
    table = {}
    for name in [key for key in result if key not in ("kept_mask", "truth", "scores")]:
        values: dict[str, list[float]] = {f"{m} {g}": [] for m in ("cosine", "spearman") for g in GROUPS}
        for layer, truth in result["truth"].items():
            for row in range(len(truth)):
                mask = result["kept_mask"][layer][row]
                for group, chosen in zip(GROUPS, (torch.ones_like(mask), mask, ~mask), strict=True):
                    pair = result[name][layer][row][chosen], truth[row][chosen]
                    if pair[0].std() > 0:
                        values[f"cosine {group}"].append(_cosine(*pair))
                        values[f"spearman {group}"].append(_spearman(*pair))
        table[name] = {key: sum(v) / len(v) for key, v in values.items() if v}
    return table


def _print_scores(content: dict) -> None:
    table = Table(title="The gradient that reaches the scores: agreement, variance from draw to draw, ms and MB kept")
    for column in ("estimator", "Pearson", "Spearman", "variance", *(f"N = {N}" for N in LENGTHS)):
        table.add_column(column, justify="left" if column == "estimator" else "right")
    for name, row in content["scores"].items():
        each = (content["cost"][name][N] for N in LENGTHS)
        costs = ("-" if c is None else f"{c['milliseconds']:.1f} ms, {c['saved_megabytes']:.1f} MB" for c in each)
        table.add_row(name, f"{row['pearson']:+.2f}", f"{row['spearman']:+.2f}", f"{row['variance']:.2g}", *costs)
    Console(width=120).print(table)


def run(images: int = 24, out_dir: str | os.PathLike = "results", model_dir=None, data_dir=None, seed: int = 0) -> dict:
    """The probe on the testbed's dense model; prints the table and writes ``estimators.json``."""
    from shiva_ext.testbed.data import load_split, to_float
    from shiva_ext.testbed.dense import flow_matching_batch
    from shiva_ext.testbed.model import load_model

    transformer, prompts = load_model(model_dir)
    pixels, labels = load_split("test", data_dir)
    generator = torch.Generator().manual_seed(seed)
    parts, scored = [], []
    for first in range(0, images, 8):
        chosen = torch.randint(len(pixels), (min(8, images - first),), generator=generator)
        sigma = (torch.arange(len(chosen)) + torch.rand(len(chosen), generator=generator)) / len(chosen)
        noisy, _ = flow_matching_batch(to_float(pixels[chosen]), sigma, generator)
        tokens, pooled = prompts(labels[chosen])
        inputs = dict(
            hidden_states=noisy, encoder_hidden_states=tokens, pooled_projections=pooled, timestep=sigma * 1000
        )
        parts.append(probe(transformer, inputs, seed=seed + first))
        scored.append(agreement(transformer, inputs, parts[-1], 0.6))
    merged = {name: {la: torch.cat([p[name][la] for p in parts]) for la in parts[0][name]} for name in parts[0]}
    cases = sum(len(truth) for truth in merged["truth"].values())
    helped = torch.cat([t.flatten() for t in merged["truth"].values()]).lt(0).float().mean().item()
    content = {
        "command": f"shiva bench estimators --images {images} --seed {seed}",
        "cases": cases,
        "layers": sorted(merged["truth"]),
        "share_of_tokens_that_help": helped,
        "estimates": compare(merged),
        "scores": {
            name: {key: statistics.fmean(part[name][key] for part in scored) for key in scored[0][name]}
            for name in scored[0]
        },
        "cost": {name: {N: cost(name, N) for N in LENGTHS} for name in scored[0]},
        "by_layer": {
            layer: compare({name: {layer: values[layer]} for name, values in merged.items()})
            for layer in merged["truth"]
        },
    }
    table = Table(title=f"Agreement with the true loss change of flipping a token, {cases} cases")
    table.add_column("estimate")
    columns = [f"{m} {g}" for m in ("cosine", "spearman") for g in GROUPS]
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in content["estimates"].items():
        table.add_row(name, *(f"{row[c]:+.2f}" if c in row else "-" for c in columns))
    Console(width=120).print(table)
    _print_scores(content)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    temporary = out_dir / "estimators.json.tmp"
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, out_dir / "estimators.json")
    return content
