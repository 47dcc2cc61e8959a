"""``shiva calibrate`` and ``shiva tune``."""

import argparse


def _calibrate(args) -> None:
    from ..bench.calibration import calibrate

    options = {name: value for name, value in vars(args).items() if name not in ("run", "command", "what")}
    print(calibrate(args.what, **options))


def _add_calibrate(commands) -> None:
    what = commands.add_parser("calibrate", help="what a cache has to know of a model, as a file for enable")
    what = what.add_subparsers(required=True, dest="what")
    for name, text in (
        ("teacache", "a polynomial from the input's change to the output's, and thresholds"),
        ("smoothcache", "which steps compute attention and MLP"),
    ):
        sub = what.add_parser(name, help=text)
        sub.add_argument("--model", required=True, help="folder of a diffusers pipeline, a hub id, or fashion or emoji")
        sub.add_argument("--revision", help="commit of a hub id")
        sub.add_argument("--out", required=True, metavar="FILE", help="JSON file to write")
        sub.add_argument("--steps", type=int, help="of the sampler; by default the pipeline's own, 25 on a testbed")
        sub.add_argument("--prompts", metavar="FILE", help="a prompt a line; by default a few that ship")
        sub.add_argument("--samples", type=int, default=70 if name == "teacache" else 10, help="pictures to make")
        sub.add_argument("--guidance", type=float, help="by default the pipeline's own, as size")
        sub.add_argument("--size", type=int, help="pixels of a side")
        sub.add_argument("--dtype", default="bfloat16")
        sub.add_argument("--device", help="by default a GPU if there is one")
        sub.add_argument("--artefact", metavar="FOLDER", help="a selection that will run beside the cache")
        if name == "teacache":
            sub.add_argument("--share", type=float, default=0.5, help="of the calls that the threshold reuses")
            sub.add_argument("--degree", type=int, default=4, help="of the polynomial, at most")
        else:
            sub.add_argument("--alpha", type=float, help="largest error of a reused output; or")
            sub.add_argument("--share", type=float, help="of the steps that are computed")
            sub.add_argument("--max-lag", type=int, default=3, help="most steps in a row that reuse")
        sub.set_defaults(run=_calibrate)


def _tune(args) -> None:
    from ..bench.tune import run

    options = {name: value for name, value in vars(args).items() if name not in ("run", "command")}
    run(**{name: value for name, value in options.items() if value is not None})


def _speed_up(text: str) -> float:
    """ "2.5x" as 2.5."""
    try:
        return float(text.removesuffix("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, wanted a speed-up such as 2.5x") from None


def _add_tune(commands) -> None:
    sub = commands.add_parser("tune", help="the selection, cache and steps that are worth it together on one's model")
    add = sub.add_argument
    add("--model", required=True, help="folder of a diffusers pipeline, a hub id, or fashion or emoji")
    add("--revision", help="commit of a hub id")
    add("--out", required=True, metavar="FILE", help="JSON file to write, for enable")
    add("--budget", type=_speed_up, metavar="2.5x", help="wanted speed-up; by default as much as the bound lets")
    add("--bound", type=float, help="least mean SSIM to the dense pictures; .8 unless given")
    add("--artefact", metavar="FOLDER", help="a trained selection")
    add("--prompts", metavar="FILE", help="a prompt a line; by default a few that ship")
    add("--samples", type=int, help="pictures to compare; 8 unless given")
    add("--steps", type=int, help="of the dense pipeline; by default its own, as guidance and size")
    add("--guidance", type=float)
    add("--size", type=int, help="pixels of a side")
    add("--dtype", help="bfloat16 unless given")
    add("--device", help="by default a GPU if there is one")
    add("--measured", type=int, help="combinations to measure; 8 unless given")
    add("--seed", type=int, help="of the noise")
    add("--cache-dir", help="of pictures and numbers; build/tune unless given")
    sub.set_defaults(run=_tune)


def add(commands) -> None:
    """Add the commands to the others."""
    _add_calibrate(commands)
    _add_tune(commands)
