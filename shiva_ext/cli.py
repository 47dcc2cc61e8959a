"""``shiva train | calibrate | tune | bench | report | demo | info``."""

import argparse
import json
import sys
from dataclasses import MISSING, asdict, fields


def _add_config(parser: argparse.ArgumentParser, config) -> None:
    """One option per field of a configuration, with its value as the default."""
    for field in fields(config):
        default = getattr(config, field.name, field.default if field.default is not MISSING else None)
        kind = _truth if isinstance(default, bool) else type(default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=default, help=str(default))


def _config(args: argparse.Namespace, cls):
    return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


def _truth(text: str) -> bool:
    """ "true" and "false", which bool() would both take for true."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}, wanted true or false")
    return text.lower() == "true"


def _train(args) -> None:
    """On one's own model and images."""
    from .training.config import TrainConfig, read_config

    names = {field.name for field in fields(TrainConfig)}
    config = read_config(args.config, **{name: value for name, value in vars(args).items() if name in names})
    if args.print_config:
        import yaml

        print(yaml.safe_dump(asdict(config), sort_keys=False), end="")
        return
    missing = [f"--{name}" for name in ("model", "data", "out") if getattr(args, name) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing; wanted shiva train --model FOLDER --data FOLDER --out FOLDER")
    from .training.fit import fit

    out = fit(args.model, args.data, args.out, config, args.revision, args.resume)
    print(f"done: shiva_ext.enable(pipe, {str(out)!r}); the training is shown in {out / 'report.html'}")


def _add_train_options(parser: argparse.ArgumentParser) -> None:
    from .training.config import TrainConfig

    parser.add_argument("--model", help="folder of a diffusers pipeline, or a hub id with --revision")
    parser.add_argument("--revision", help="commit of a hub id")
    parser.add_argument("--data", help="folder of images with captions: a .txt beside each, or a metadata.jsonl")
    parser.add_argument("--out", help="folder for the artefact, its encodings and checkpoints")
    parser.add_argument("--config", help="YAML file of settings; options given here come before it")
    parser.add_argument("--print-config", action="store_true", help="show all settings as YAML, and stop")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    for field in fields(TrainConfig):
        kind = _truth if isinstance(field.default, bool) else type(field.default)
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=kind, default=argparse.SUPPRESS, help=f"default {field.default}")
    parser.set_defaults(run=_train)


def _train_dense(args) -> None:
    from .testbed.dense import DenseConfig, train

    train(_config(args, DenseConfig), args.out, args.data_dir)


def _train_emoji(args) -> None:
    from .testbed.emoji import DenseConfig, train

    train(_config(args, DenseConfig), args.out)


def _train_emoji_selection(args) -> None:
    from .testbed.emoji_selection import train
    from .training.config import TrainConfig

    train(_config(args, TrainConfig), args.out, args.dense_model, args.resume)


def _train_emoji_classifier(args) -> None:
    from .testbed.emoji_classifier import EmojiClassifierConfig, train

    record = train(_config(args, EmojiClassifierConfig), args.out)
    print(json.dumps({k: v for k, v in record.items() if k != "captions"}, indent=1))


def _train_classifier(args) -> None:
    from .testbed.classifier import ClassifierConfig, train

    print(json.dumps(train(_config(args, ClassifierConfig), args.out, args.data_dir), indent=1))


def _train_caf(args, rectified_flow: bool = False) -> None:
    from .caf.fashion import train
    from .caf.train import CAFConfig

    place = args.out, args.pairs, args.pairs_dir, args.dense_model
    folder = train(_config(args, CAFConfig), *place, resume=args.resume, rectified_flow=rectified_flow)
    print(f"done: {folder}; 'shiva bench caf' compares it")


def _train_rectified_flow(args) -> None:
    _train_caf(args, rectified_flow=True)


def _train_experts(args) -> None:
    from .testbed.experts import ExpertsConfig, train

    train(_config(args, ExpertsConfig), args.out, args.dense_model, args.data_dir, args.control)


def _train_vlm(args) -> None:
    from .testbed.quadrants import VLMConfig, train

    train(_config(args, VLMConfig), args.out, args.data_dir)


def _train_testbed(args) -> None:
    from .testbed.train_shiva import train
    from .training.config import TrainConfig

    train(_config(args, TrainConfig), args.out, args.dense_model, args.data_dir, args.control, args.resume)


def _bench_synthetic(args) -> None:
    from .bench.synthetic import run

    run(seeds=args.seeds, out_dir=args.out)


def _bench_estimators(args) -> None:
    from .bench.estimators import run

    run(args.images, args.out, args.dense_model, args.data_dir, args.seed)


def _bench_trial(args) -> None:
    from .bench.trial import run

    run(args.steps, args.samples, args.out, args.dense_model, args.data_dir, args.seed, tuple(args.estimators))


def _bench_pareto(args) -> None:
    own = {option.dest: getattr(args, option.dest) for option in _model_options(argparse.ArgumentParser())}
    if args.model is None:
        if given := [name for name, value in own.items() if value is not None]:
            raise ValueError(f"--{given[0].replace('_', '-')} is for one's own checkpoint; give --model, too")
        from .bench.pareto import run

        place = args.out, args.cache_dir, args.model_dir
        run(args.samples or 1000, args.methods, *place, testbed=args.testbed, seeds=args.seeds)
        return
    if args.model_dir is not None or args.seeds != 1:
        raise ValueError("--model-dir and --seeds are for the testbeds; --model is the checkpoint, --seed its noise")
    from .bench.pareto_model import run

    own["samples"], own["weights"] = args.samples, _pairs(args.weights)
    options = {name: value for name, value in own.items() if value is not None}
    run(methods=args.methods, out=args.out, cache_dir=args.cache_dir, **options)


def _bench_moe(args) -> None:
    from .bench.moe import run

    run(args.samples, args.experts, args.control, args.dense_model, args.data_dir, args.out)


def _bench_feather(args) -> None:
    from .bench.feather import run

    run(args.vlm, args.samples, args.data_dir, args.out)


def _bench_compose(args) -> None:
    from .bench.compose import run

    run(args.samples, args.methods, args.out, args.cache_dir, args.testbed, args.seeds)


def _bench_caf(args) -> None:
    from .bench.caf import run

    run(args.samples, args.seed, args.caf, args.rectified_flow, args.dense_model, args.out, args.cache_dir)


def _pairs(given: list[str] | None) -> dict[str, str]:
    """``clip=FOLDER`` as a dictionary."""
    for each in given or []:
        if not all(each.partition("=")):
            raise ValueError(f"--weights is {each!r}, wanted METRIC=PATH, such as clip=my-clip")
    return dict(each.split("=", 1) for each in given or [])


def _model_options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Of ``bench pareto`` on one's own checkpoint; None is the default of :func:`~.bench.pareto_model.run`."""
    add = parser.add_argument
    return [
        add("--model", help="one's own checkpoint instead: folder of a diffusers pipeline, or a hub id"),
        add("--revision", help="commit of a hub id"),
        add("--name", help="of the files pareto_NAME.json and so on; by default the model's"),
        add("--prompts", metavar="FILE", help="a prompt a line; by default a few that ship"),
        add("--steps", type=int, help="by default the pipeline's own, as guidance and size"),
        add("--guidance", type=float),
        add("--size", type=int, help="pixels of a side"),
        add("--artefact", metavar="FOLDER", help="trained selection, for Shiva's cells"),
        add("--metrics", nargs="+", metavar="NAME", help="clip, clip-iqa, fid, image-reward; PSNR and SSIM are always"),
        add("--weights", nargs="+", metavar="NAME=PATH", help="local weights of metrics"),
        add("--real", metavar="FOLDER", help="of pictures, for fid"),
        add("--quality", metavar="NAME", help="what the front is of: fid, ssim, psnr or another metric"),
        add("--dtype", help="of the model; bfloat16 unless given"),
        add("--device", help="by default a GPU if there is one"),
        add("--batch-size", type=int, help="pictures a call; 1 unless given"),
        add("--seed", type=int, help="of the noise"),
        add("--timing-repeats", type=int, help="pairs of calls a cell; 3 unless given"),
    ]


def _calibrate(args) -> None:
    from .bench.calibration import calibrate

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
    from .bench.tune import run

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
    add("--model", required=True, help="folder of a diffusers pipeline, or a hub id")
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


def _report_testbed(args) -> None:
    from .testbed.report import report

    report(args.samples, args.seeds, args.cache_dir, args.out, args.rows or None)


def _report_emoji(args) -> None:
    from .testbed.emoji_selection import report

    report(args.dense_model, args.selection, args.images)


def _demo(args) -> None:
    if args.prompts is not None:
        from .testbed.emoji_demo import PROMPTS, run

        run(args.out, args.steps, args.prompts or PROMPTS)
        return
    from .testbed.demo import run

    run(args.out, args.steps)


def _info(args) -> None:
    from . import build_info

    print(json.dumps(build_info(), indent=1))


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from .bench.caf import CAF_DIR, CONTROL_DIR
    from .bench.trial import ESTIMATORS as TRIED
    from .caf.fashion import CONFIG as CAF_CONFIG
    from .caf.fashion import PAIRS, PAIRS_DIR
    from .testbed.classifier import ClassifierConfig
    from .testbed.dense import DenseConfig
    from .testbed.emoji import CONFIG as EMOJI_CONFIG
    from .testbed.emoji_classifier import EmojiClassifierConfig
    from .testbed.emoji_selection import ARTEFACT as EMOJI_ARTEFACT
    from .testbed.emoji_selection import CONFIG as EMOJI_SELECTION_CONFIG
    from .testbed.emoji_selection import DENSE as EMOJI_DENSE
    from .testbed.experts import CONTROL_DIR as DENSE_ON_DIR
    from .testbed.experts import EXPERTS_DIR, ExpertsConfig
    from .testbed.quadrants import VLM_DIR, VLMConfig
    from .testbed.train_shiva import TESTBED_CONFIG

    root = argparse.ArgumentParser(prog="shiva", description=__doc__)
    commands = root.add_subparsers(required=True, dest="command")

    train = commands.add_parser("train", help="train selection for your model on your images, or a testbed's models")
    _add_train_options(train)
    train = train.add_subparsers(metavar="what", title="the testbed's models")
    for name, run, config, text in (
        ("dense", _train_dense, DenseConfig(), "the dense diffusion model"),
        ("emoji", _train_emoji, EMOJI_CONFIG, "the dense model of the second testbed, captions to emoji"),
        ("emoji-selection", _train_emoji_selection, EMOJI_SELECTION_CONFIG, "router, policy and adapters for it"),
        ("emoji-classifier", _train_emoji_classifier, EmojiClassifierConfig(), "the classifier of its pictures"),
        ("classifier", _train_classifier, ClassifierConfig(), "the classifier behind the metrics"),
        ("testbed", _train_testbed, TESTBED_CONFIG, "router, policy and adapters of the testbed's model"),
        ("experts", _train_experts, ExpertsConfig(), "experts in the place of the testbed's dense MLPs"),
        ("vlm", _train_vlm, VLMConfig(), "a small vision-language model that must look at the right place"),
        ("caf", _train_caf, CAF_CONFIG, "constant acceleration flow on pairs of the testbed's model: few steps"),
        ("rectified-flow", _train_rectified_flow, CAF_CONFIG, "the control of caf: a rectified flow on the same pairs"),
    ):
        sub = train.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.add_argument("--out", required=True, help="folder to write")
        if name == "emoji-selection":
            sub.add_argument("--dense-model", default=EMOJI_DENSE, help="of 'shiva train emoji'; by default what ships")
            sub.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
        elif name in ("caf", "rectified-flow"):
            sub.add_argument("--dense-model", help="the teacher's folder; by default the one that ships")
            sub.add_argument("--pairs", type=int, default=PAIRS, help="of the teacher; those that are missing are made")
            sub.add_argument("--pairs-dir", default=PAIRS_DIR, help="their folder, which both share")
            sub.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
        elif not name.startswith("emoji"):
            sub.add_argument("--data-dir", help="folder of the Fashion-MNIST .gz files")
        _add_config(sub, config)
        if name == "testbed":
            sub.add_argument("--dense-model", help="dense model's folder; by default the one that ships")
            sub.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
            sub.add_argument("--control", action="store_true", help="fine-tune densely instead, as the control")
        if name == "experts":
            sub.add_argument("--dense-model", help="where to start; by default the one that ships")
            sub.add_argument("--control", action="store_true", help="train the dense model on instead, as the control")
        sub.set_defaults(run=run)

    _add_calibrate(commands)
    _add_tune(commands)
    bench = commands.add_parser("bench", help="small experiments").add_subparsers(required=True, dest="what")
    sub = bench.add_parser("synthetic", help="the paper's synthetic task (A.3)")
    sub.add_argument("--seeds", type=int, default=5)
    sub.add_argument("--out", default="results")
    sub.set_defaults(run=_bench_synthetic)
    sub = bench.add_parser("estimators", help="estimates of a token's worth against the truth")
    sub.add_argument("--images", type=int, default=24)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--out", default="results")
    sub.add_argument("--dense-model")
    sub.add_argument("--data-dir")
    sub.set_defaults(run=_bench_estimators)
    sub = bench.add_parser("trial", help="a router alone, trained by each estimator")
    sub.add_argument("--steps", type=int, default=300)
    sub.add_argument("--samples", type=int, default=300)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--out", default="results")
    sub.add_argument("--dense-model")
    sub.add_argument("--data-dir")
    sub.add_argument("--estimators", nargs="+", default=TRIED, metavar="NAME", help="see 'shiva train --estimator'")
    sub.set_defaults(run=_bench_trial)

    sub = bench.add_parser("caf", help="constant acceleration flow: quality against evaluations of a network")
    sub.add_argument("--samples", type=int, default=1000, help="images a row")
    sub.add_argument("--seed", type=int, default=0, help="of the noise")
    sub.add_argument("--caf", default=CAF_DIR, help="folder of 'shiva train caf'")
    sub.add_argument("--rectified-flow", default=CONTROL_DIR, help="folder of 'shiva train rectified-flow'")
    sub.add_argument("--dense-model", help="the teacher's folder; by default the one that ships")
    sub.add_argument("--out", default="results", help="folder of caf.json and caf.png")
    sub.add_argument("--cache-dir", default="build/caf/samples", help="folder of the images")
    sub.set_defaults(run=_bench_caf)

    sub = bench.add_parser("moe", help="experts against the dense model at equal compute a token")
    sub.add_argument("--samples", type=int, default=1000, help="images a model")
    sub.add_argument("--experts", default=EXPERTS_DIR, help="folder of 'shiva train experts'")
    sub.add_argument("--control", default=DENSE_ON_DIR, help="folder of 'shiva train experts --control'")
    sub.add_argument("--dense-model", help="what both began as; by default the one that ships")
    sub.add_argument("--data-dir", help="folder of the Fashion-MNIST .gz files")
    sub.add_argument("--out", default="results", help="folder of moe.json and moe.png")
    sub.set_defaults(run=_bench_moe)

    sub = bench.add_parser("feather", help="fewer visual tokens on 'shiva train vlm's model, and their position bias")
    sub.add_argument("--samples", type=int, default=1000, help="questions")
    sub.add_argument("--vlm", default=VLM_DIR, help="folder of 'shiva train vlm'")
    sub.add_argument("--data-dir", help="folder of the Fashion-MNIST .gz files")
    sub.add_argument("--out", default="results", help="folder of feather.json and feather.png")
    sub.set_defaults(run=_bench_feather)

    sub = bench.add_parser("pareto", help="every method at several strengths: quality against time, as a page")
    sub.add_argument("--testbed", default="fashion", help="fashion or emoji")
    sub.add_argument("--samples", type=int, help="images a cell; 1000, or 64 of one's own checkpoint")
    sub.add_argument("--methods", nargs="*", metavar="NAME", help="by default all; dense always runs")
    sub.add_argument("--seeds", type=int, default=1, help="of the noise; cells that have as many stay")
    sub.add_argument("--out", default="results", help="folder of pareto.json, which finished cells are read from")
    sub.add_argument("--cache-dir", default="build/pareto", help="folder of the images")
    sub.add_argument("--model-dir", help="dense model's folder; by default the one that ships")
    _model_options(sub.add_argument_group("one's own checkpoint"))
    sub.set_defaults(run=_bench_pareto)

    sub = bench.add_parser("compose", help="selection, caches and fewer steps, alone and together, as a page")
    sub.add_argument("--testbed", default="fashion", help="fashion or emoji")
    sub.add_argument("--samples", type=int, default=1000, help="images a cell")
    sub.add_argument("--methods", nargs="*", metavar="NAME", help="such as 'Shiva + TeaCache'; by default all")
    sub.add_argument("--seeds", type=int, default=1, help="of the noise")
    sub.add_argument("--out", default="results", help="folder of compose.json, which finished cells are read from")
    sub.add_argument("--cache-dir", default="build/pareto", help="folder of the images")
    sub.set_defaults(run=_bench_compose)

    report = commands.add_parser("report", help="evaluations").add_subparsers(required=True, dest="what")
    sub = report.add_parser("testbed", help="every method on the testbed: quality, cost and time")
    sub.add_argument("--samples", type=int, default=2000)
    sub.add_argument("--seeds", type=int, default=3)
    sub.add_argument("--cache-dir", default="build/testbed")
    sub.add_argument("--out", default="results")
    sub.add_argument("--rows", nargs="*", help="names of rows; by default all")
    sub.set_defaults(run=_report_testbed)

    sub = report.add_parser("emoji", help="how kept tokens match the objects of the second testbed")
    sub.add_argument("--dense-model", default=EMOJI_DENSE, help="of 'shiva train emoji'; by default what ships")
    sub.add_argument("--selection", default=EMOJI_ARTEFACT, help="of 'shiva train emoji-selection'; likewise")
    sub.add_argument("--images", type=int, default=256)
    sub.set_defaults(run=_report_emoji)

    sub = commands.add_parser("demo", help="dense and pruned side by side, as a picture and a table")
    sub.add_argument("--out", default="build/demo")
    sub.add_argument("--steps", type=int, default=20)
    sub.add_argument(
        "--prompts",
        nargs="*",
        metavar="PROMPT",
        help="of the second testbed, captions to emoji; without any, some of its",
    )
    sub.set_defaults(run=_demo)

    commands.add_parser("info", help="how the compiled library was built").set_defaults(run=_info)
    return root


def main(argv: list[str] | None = None) -> int:
    """Entry point; errors that a user can mend are one line on stderr and exit status 1."""
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except (ImportError, OSError, TypeError, ValueError, FloatingPointError) as error:
        print(f"shiva: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
