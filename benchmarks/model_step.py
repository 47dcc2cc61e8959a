"""One denoising step of a large model's architecture on this machine, dense and pruned, interleaved.

Random weights, bfloat16: SD3.5-Medium (2.2 B parameters, 333 text tokens), PixArt-Sigma (0.6 B, 300 text tokens), or
Flux.1's width (512 text tokens) with as many joint blocks as asked for and twice as many single ones, of which all 19
and 38 would take 24 GB; at 1024 x 1024 pixels (4,096 image tokens) or another size. Prints and writes, per ratio:
seconds, speed-up (median of the pairs), for the last ratio the same with every block wrapped, what the operations alone
allow, and the share of the wrapped step spent in our ops (fused blocks do their norms and gates in them, which is the
model's own work).

    python benchmarks/model_step.py [--model sd35] [--ratios .8 .6] [--repeats 5] [--layers 24] [--pixels 1024]
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel
from torch import nn
from tqdm import tqdm

import shiva_ext
from shiva_ext.evaluation.overhead import share_of_ops
from shiva_ext.models import adapter_for
from shiva_ext.selection import RatioTable, ShivaRouter

LAYERS = {"sd35": 24, "pixart": 28, "flux": 4}
TEXT_TOKENS = {"sd35": 333, "pixart": 300, "flux": 512}


def random_weights(model: nn.Module) -> nn.Module:
    """A model on the meta device gets random bfloat16 weights, without a float32 copy."""
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.normal_(0, 0.02)
    return model.eval()


def build(name: str, layers: int, side: int) -> tuple[nn.Module, dict]:
    """A model for latents of side x side, and the arguments of a call."""
    tokens = TEXT_TOKENS[name]
    if name == "pixart":
        with torch.device("meta"):
            model = PixArtTransformer2DModel(
                num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=layers,
                cross_attention_dim=1152, caption_channels=4096, sample_size=128, use_additional_conditions=False,
            )  # fmt: skip
        inputs = dict(
            hidden_states=torch.randn(1, 4, side, side, dtype=torch.bfloat16),
            encoder_hidden_states=torch.randn(1, tokens, 4096, dtype=torch.bfloat16),
            encoder_attention_mask=torch.ones(1, tokens, dtype=torch.bfloat16),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        )
    elif name == "flux":
        with torch.device("meta"):
            model = FluxTransformer2DModel(num_layers=layers, num_single_layers=2 * layers, guidance_embeds=True)
        rows, columns = torch.meshgrid(torch.arange(side // 2), torch.arange(side // 2), indexing="ij")
        inputs = dict(
            hidden_states=torch.randn(1, rows.numel(), 64, dtype=torch.bfloat16),
            encoder_hidden_states=torch.randn(1, tokens, 4096, dtype=torch.bfloat16),
            pooled_projections=torch.randn(1, 768, dtype=torch.bfloat16),
            guidance=torch.full((1,), 3.5),
            img_ids=torch.stack([torch.zeros(rows.numel()), rows.flatten(), columns.flatten()], dim=1),
            txt_ids=torch.zeros(tokens, 3),
        )
    else:
        with torch.device("meta"):
            model = SD3Transformer2DModel(
                sample_size=128, num_layers=layers, num_attention_heads=24, attention_head_dim=64,
                joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048, out_channels=16,
                pos_embed_max_size=384, dual_attention_layers=tuple(range(min(13, layers))), qk_norm="rms_norm",
            )  # fmt: skip
        inputs = dict(
            hidden_states=torch.randn(1, 16, side, side, dtype=torch.bfloat16),
            encoder_hidden_states=torch.randn(1, tokens, 4096, dtype=torch.bfloat16),
            pooled_projections=torch.randn(1, 2048, dtype=torch.bfloat16),
        )
    timestep = torch.full((1,), 0.5 if name == "flux" else 500.0)
    return random_weights(model), inputs | dict(timestep=timestep, return_dict=False)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", choices=LAYERS, default="sd35")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--out", help="by default results/<model>_step.json")
    args = parser.parse_args()
    args.layers = args.layers or LAYERS[args.model]

    torch.manual_seed(0)
    side = args.pixels // 8
    N = (side // 2) ** 2
    model, inputs = build(args.model, args.layers, side)
    adapter = adapter_for(model)
    router = ShivaRouter(**adapter.dims(model)).to(torch.bfloat16)
    table = RatioTable.fixed(0.5, len(adapter.blocks(model)))
    artifact = shiva_ext.ShivaArtifact(type(model).__name__, router, table)

    def step(ratio: float, fused: bool) -> float:
        if ratio < 1:
            shiva_ext.enable(model, artifact, ratio=ratio, fused=fused)
        started = time.perf_counter()
        model(**inputs)
        seconds = time.perf_counter() - started
        shiva_ext.disable(model)
        return seconds

    variants = [(1.0, True), *((ratio, True) for ratio in args.ratios), (args.ratios[-1], False)]
    times: dict[tuple[float, bool], list[float]] = {variant: [] for variant in variants}
    for repeat in tqdm(range(args.repeats + 1), desc="steps, interleaved"):
        for variant, measured in times.items():
            seconds = step(*variant)
            if repeat:  # the first round warms up
                measured.append(seconds)
    dense = times[1.0, True]

    def speed_up(ratio: float, fused: bool) -> float | None:
        if (ratio, fused) not in times:
            return None
        return statistics.median(d / s for d, s in zip(dense, times[ratio, fused], strict=True))

    text_tokens = TEXT_TOKENS[args.model]
    dense_flops = adapter.forward_flops(model, text_tokens, N)
    rows = []
    for ratio in args.ratios:
        with shiva_ext.enable(model, artifact, ratio=ratio, fused=False):
            flops = shiva_ext.summary(model, N, steps=[0.5], text_tokens=text_tokens).flops[0]
            shares = share_of_ops(lambda: model(**inputs))
        rows.append(
            {
                "ratio": ratio,
                "dense_seconds": statistics.median(dense),
                "seconds": statistics.median(times[ratio, True]),
                "speed_up": speed_up(ratio, True),
                "speed_up_wrapped": speed_up(ratio, False),
                "speed_up_by_flops": dense_flops / flops,
                "tflops": flops / 1e12,
                "share_of_ops": sum(shares.values()),
                "shares": shares,
            }
        )
        row = rows[-1]
        wrapped = f"wrapped {row['speed_up_wrapped']:.3f}x, " if row["speed_up_wrapped"] else ""
        print(
            f"ratio {ratio}: dense {row['dense_seconds']:.2f} s, pruned {row['seconds']:.2f} s, {row['speed_up']:.3f}x "
            f"({wrapped}operations allow {row['speed_up_by_flops']:.3f}x), our ops "
            f"{row['share_of_ops']:.2%} of the wrapped step: "
            + ", ".join(f"{name} {share:.2%}" for name, share in shares.items())
        )
    content = {
        "command": f"python benchmarks/model_step.py --model {args.model} --repeats {args.repeats} "
        f"--layers {args.layers} --pixels {args.pixels}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "image_tokens": N,
        "text_tokens": text_tokens,
        "dense_tflops": dense_flops / 1e12,
        "rows": rows,
    }
    path = Path(args.out or f"results/{args.model}_step.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
