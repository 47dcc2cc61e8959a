"""One denoising step of SD3.5-Medium's architecture on this machine, dense and pruned, interleaved.

Random weights, bfloat16, 1024 x 1024 pixels (4,096 image tokens), 333 text tokens. Prints and writes, per ratio:
seconds, speed-up (median of the pairs), what the operations alone allow, and the share of the step spent in our ops.

    python benchmarks/sd35_step.py [--ratios .8 .6] [--repeats 5] [--layers 24] [--pixels 1024]
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from tqdm import tqdm

import shiva_ext
from shiva_ext.evaluation.flops import sd3_forward_flops
from shiva_ext.evaluation.overhead import share_of_ops
from shiva_ext.models import adapter_for
from shiva_ext.selection import RatioTable, ShivaRouter

TEXT_TOKENS = 333


def build(layers: int) -> SD3Transformer2DModel:
    """SD3.5-Medium with random weights, made without a float32 copy."""
    with torch.device("meta"):
        model = SD3Transformer2DModel(
            sample_size=128,
            num_layers=layers,
            num_attention_heads=24,
            attention_head_dim=64,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            out_channels=16,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(min(13, layers))),
            qk_norm="rms_norm",
        )
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.normal_(0, 0.02)
    return model.eval()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--out", default="results/sd35_step.json")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = build(args.layers)
    side = args.pixels // 8
    N = (side // 2) ** 2
    inputs = dict(
        hidden_states=torch.randn(1, 16, side, side, dtype=torch.bfloat16),
        encoder_hidden_states=torch.randn(1, TEXT_TOKENS, 4096, dtype=torch.bfloat16),
        pooled_projections=torch.randn(1, 2048, dtype=torch.bfloat16),
        timestep=torch.full((1,), 500.0),
        return_dict=False,
    )
    router = ShivaRouter(**adapter_for(model).dims(model)).to(torch.bfloat16)
    table = RatioTable.fixed(0.5, args.layers)
    artifact = shiva_ext.ShivaArtifact(type(model).__name__, router, table)

    def step(ratio: float) -> float:
        if ratio < 1:
            shiva_ext.enable(model, artifact, ratio=ratio)
        started = time.perf_counter()
        model(**inputs)
        seconds = time.perf_counter() - started
        shiva_ext.disable(model)
        return seconds

    times: dict[float, list[float]] = {ratio: [] for ratio in (1.0, *args.ratios)}
    for repeat in tqdm(range(args.repeats + 1), desc="steps, interleaved"):
        for ratio in times:
            seconds = step(ratio)
            if repeat:  # the first round warms up
                times[ratio].append(seconds)
    dense_flops = sd3_forward_flops(model, TEXT_TOKENS, N)
    rows = []
    for ratio in args.ratios:
        k = {layer: int(N * ratio) for layer in range(1, args.layers)}
        flops = sd3_forward_flops(model, TEXT_TOKENS, N, k, router.config.hidden)
        with shiva_ext.enable(model, artifact, ratio=ratio):
            shares = share_of_ops(lambda: model(**inputs))
        rows.append(
            {
                "ratio": ratio,
                "dense_seconds": statistics.median(times[1.0]),
                "seconds": statistics.median(times[ratio]),
                "speed_up": statistics.median(d / s for d, s in zip(times[1.0], times[ratio], strict=True)),
                "speed_up_by_flops": dense_flops / flops,
                "tflops": flops / 1e12,
                "share_of_ops": sum(shares.values()),
                "shares": shares,
            }
        )
        row = rows[-1]
        print(
            f"ratio {ratio}: dense {row['dense_seconds']:.2f} s, pruned {row['seconds']:.2f} s, {row['speed_up']:.3f}x "
            f"(operations allow {row['speed_up_by_flops']:.3f}x), our ops {row['share_of_ops']:.2%} of the step: "
            + ", ".join(f"{name} {share:.2%}" for name, share in shares.items())
        )
    content = {
        "command": "python benchmarks/sd35_step.py "
        f"--repeats {args.repeats} --layers {args.layers} --pixels {args.pixels}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "image_tokens": N,
        "text_tokens": TEXT_TOKENS,
        "dense_tflops": dense_flops / 1e12,
        "rows": rows,
    }
    path = Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
