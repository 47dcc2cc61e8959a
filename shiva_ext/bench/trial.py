"""Does the router learn at all? Router alone, backbone frozen, no policy, no adapter: one run per estimator.

One router a layer, ratio uniform in .35-.9, distillation to the dense teacher's output. Then every block is pruned to
60 %, and two things are measured: the squared distance to the teacher's output on held-out images, and the Fréchet
distance of generated images. Random tokens are the line to beat.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import shiva_ext
from shiva_ext.selection import RandomSelector, RatioTable
from shiva_ext.training.config import TrainConfig

ESTIMATORS = ("counterfactual", "residual", "residual_flipped")
RATIO, SAMPLER_STEPS = 0.6, 16


def _config(estimator: str, steps: int, seed: int) -> TrainConfig:
    return TrainConfig(
        budget=RATIO,
        estimator=estimator,
        router_steps=steps,
        policy_steps=0,
        joint_steps=0,
        batch_size=16,
        micro_batches=2,
        ratio_min=0.35,
        ratio_max=0.9,
        lr_router=2e-3,
        warmup=20,
        diffusion_weight=0.0,
        output_weight=1.0,
        feature_weight=0.0,
        share=1,
        seed=seed,
    )


@torch.no_grad()
def held_out_error(transformer, prompts, source, images: int, data_dir=None) -> float:
    """Mean squared distance of the pruned model's output to the dense one's, on test images at even noise levels."""
    from shiva_ext.testbed.data import load_split, to_float
    from shiva_ext.testbed.dense import flow_matching_batch

    pixels, labels = load_split("test", data_dir)
    generator = torch.Generator().manual_seed(1)
    total = 0.0
    for part in range(images // 16):
        chosen = slice(16 * part, 16 * part + 16)
        level = (part + 0.5) / (images // 16)
        sigma = torch.full((16,), level)
        noisy, _ = flow_matching_batch(to_float(pixels[chosen]), sigma, generator)
        inputs = (noisy, *prompts(labels[chosen]), sigma * 1000)
        dense = transformer(*inputs, return_dict=False)[0]
        with shiva_ext.enable(transformer, source):
            total += (transformer(*inputs, return_dict=False)[0] - dense).square().mean().item()
    return total / (images // 16)


def run(
    steps: int = 300,
    samples: int = 300,
    out_dir: str | os.PathLike = "results",
    model_dir=None,
    data_dir=None,
    seed: int = 0,
    estimators: tuple[str, ...] = ESTIMATORS,
) -> dict:
    """Train and measure one router per estimator; prints the table and writes ``trial.json``."""
    from shiva_ext.evaluation.metrics import frechet_distance, gaussian
    from shiva_ext.testbed.classifier import load_classifier, load_statistics
    from shiva_ext.testbed.model import load_model
    from shiva_ext.testbed.sampling import balanced_labels, generate, make_noise
    from shiva_ext.testbed.train_shiva import batch_source
    from shiva_ext.training.trainer import ShivaTrainer

    classifier, statistics = load_classifier(), load_statistics()
    sources: dict[str, object] = {"random tokens": RandomSelector(RATIO)}
    rows = {}
    for name in ("random tokens", *estimators):
        transformer, prompts = load_model(model_dir)
        history = []
        if name in estimators:
            config = _config(name, steps, seed)
            trainer = ShivaTrainer(transformer, config, batch_source(prompts, config.prompt_dropout, data_dir))
            trainer.run_stage("router", steps)
            trainer.close()
            history = trainer.history
            trainer.artifact.table = RatioTable.fixed(RATIO, trainer.num_layers)
            sources[name] = trainer.artifact
        error = held_out_error(transformer, prompts, sources[name], 320, data_dir)
        with shiva_ext.enable(transformer, sources[name], batched_guidance=True):
            images = generate(transformer, prompts, balanced_labels(samples), make_noise(samples, 0), SAMPLER_STEPS)
        distance = frechet_distance(
            *gaussian(classifier.measure(images)[0]), statistics["mean"], statistics["covariance"]
        )
        rows[name] = {"held_out_error": error, "fid": distance, "history": history}
        print(f"{name}: held-out error {error:.4f}, classifier-FID {distance:.3f}", flush=True)
    content = {
        "command": f"shiva bench trial --steps {steps} --samples {samples} --seed {seed} "
        f"--estimators {' '.join(estimators)}",
        "config": asdict(_config("counterfactual", steps, seed)),
        "rows": rows,
    }
    table = Table(title=f"Router alone, {steps} steps of 16; every block at {RATIO:.0%}")
    for column in ("router trained by", "held-out error", f"classifier-FID, {samples} samples"):
        table.add_column(column)
    for name, row in rows.items():
        table.add_row(name, f"{row['held_out_error']:.4f}", f"{row['fid']:.3f}")
    Console().print(table)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    temporary = out_dir / "trial.json.tmp"
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, out_dir / "trial.json")
    return content
