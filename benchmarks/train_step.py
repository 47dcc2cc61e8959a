"""What a training step costs: with selection at a ratio, and densely, with the same adapters, teacher and losses.

On the testbed's model; steps of the joint stage (forward of teacher and student, backward, no optimizer), interleaved.
The paper (Shiva-DiT, arXiv 2602.05605) reports 1.07 times the time of a dense step, DiffCR 1.65.

    python benchmarks/train_step.py [--ratios .8 .6] [--repeats 30] [--checkpointing]
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

from shiva_ext.testbed.model import IMAGE_SIZE, PROMPT_DIM, PROMPT_TOKENS, load_model
from shiva_ext.testbed.train_shiva import TESTBED_CONFIG
from shiva_ext.training.losses import distillation_loss
from shiva_ext.training.stages import run_student, run_teacher
from shiva_ext.training.trainer import ShivaTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=8, help="samples of a call")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--out", default="results/train_step.json")
    args = parser.parse_args()

    torch.manual_seed(0)
    transformer, _ = load_model()
    trainer = ShivaTrainer(transformer, TESTBED_CONFIG, lambda *_: None)
    trainer.add_adapters()
    if args.checkpointing:
        transformer.enable_gradient_checkpointing()
    state, B = trainer.state, args.batch_size
    inputs = dict(
        hidden_states=torch.randn(B, 1, IMAGE_SIZE, IMAGE_SIZE),
        encoder_hidden_states=torch.randn(B, PROMPT_TOKENS, PROMPT_DIM),
        pooled_projections=torch.randn(B, PROMPT_DIM),
        timestep=torch.full((B,), 500.0),
    )
    params = [p for p in transformer.parameters() if p.requires_grad] + list(trainer.router.parameters())

    def step(ratio: float) -> float:
        for p in params:
            p.grad = None
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            teacher = run_teacher(transformer, state, **inputs)
            if ratio < 1:
                ratios = torch.full((trainer.num_layers,), ratio, requires_grad=True)
                output, student = run_student(transformer, state, trainer.estimator, ratios, teacher, **inputs)
                features = student.outputs
            else:
                state.active, state.captured = False, {}
                output = transformer(**inputs, return_dict=False)[0]
                features = {layer: after for layer, (_, after) in state.captured.items()}
                state.active, state.captured = True, None
        layers = [layer for layer in trainer.layers if layer in features]
        loss = F.mse_loss(output.float(), teacher.output.float()) + 0.1 * distillation_loss(
            [features[layer] for layer in layers], [teacher.tokens[layer][1] for layer in layers]
        )
        loss.backward()
        return time.perf_counter() - started

    times: dict[float, list[float]] = {ratio: [] for ratio in (1.0, *args.ratios)}
    for repeat in tqdm(range(args.repeats + 3), desc="steps, interleaved"):
        for ratio, measured in times.items():
            seconds = step(ratio)
            if repeat >= 3:
                measured.append(seconds)
    rows = []
    for ratio in args.ratios:
        pairs = sorted(s / d for d, s in zip(times[1.0], times[ratio], strict=True))
        rows.append(
            {
                "ratio": ratio,
                "dense_seconds": statistics.median(times[1.0]),
                "seconds": statistics.median(times[ratio]),
                "times_dense": statistics.median(pairs),
                "quartiles": [pairs[len(pairs) // 4], pairs[3 * len(pairs) // 4]],
            }
        )
        row = rows[-1]
        print(
            f"ratio {ratio}: {row['seconds']:.3f} s, {row['times_dense']:.3f} times a dense step "
            f"(quartiles {row['quartiles'][0]:.3f} to {row['quartiles'][1]:.3f})"
        )
    content = {
        "command": f"python benchmarks/train_step.py --repeats {args.repeats} --batch-size {B}"
        + (" --checkpointing" if args.checkpointing else ""),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": rows,
    }
    path = Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(content, indent=1) + "\n")
    os.replace(path.with_suffix(".tmp"), path)


if __name__ == "__main__":
    main()
