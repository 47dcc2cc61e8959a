"""``shiva bench``."""

import argparse


def _bench_synthetic(args) -> None:
    from ..bench.synthetic import run

    run(seeds=args.seeds, out_dir=args.out)


def _bench_estimators(args) -> None:
    from ..bench.estimators import run

    run(args.images, args.out, args.dense_model, args.data_dir, args.seed)


def _bench_trial(args) -> None:
    from ..bench.trial import run

    run(args.steps, args.samples, args.out, args.dense_model, args.data_dir, args.seed, tuple(args.estimators))


def _bench_pareto(args) -> None:
    own = {option.dest: getattr(args, option.dest) for option in _model_options(argparse.ArgumentParser())}
    if args.model is None:
        if given := [name for name, value in own.items() if value is not None]:
            raise ValueError(f"--{given[0].replace('_', '-')} is for one's own checkpoint; give --model, too")
        from ..bench.pareto import run

        place = args.out, args.cache_dir, args.model_dir
        how = dict(testbed=args.testbed, seeds=args.seeds, retime=args.retime)
        run(args.samples or 1000, args.methods, *place, **how)
        return
    if args.model_dir is not None or args.seeds != 1 or args.retime:
        raise ValueError(
            "--model-dir, --seeds and --retime are for the testbeds; --model is the checkpoint, --seed its noise"
        )
    from ..bench.pareto_model import run

    own["samples"], own["weights"] = args.samples, _pairs(args.weights)
    options = {name: value for name, value in own.items() if value is not None}
    run(methods=args.methods, out=args.out, cache_dir=args.cache_dir, **options)


def _bench_moe(args) -> None:
    from ..bench.moe import run

    run(args.samples, args.experts, args.control, args.dense_model, args.data_dir, args.out)


def _bench_feather(args) -> None:
    from ..bench.feather import run

    run(args.vlm, args.samples, args.data_dir, args.out)


def _bench_vit(args) -> None:
    from ..bench.vit import run

    run(args.vit, args.samples, args.repeats, args.data_dir, args.out)


def _bench_schedule(args) -> None:
    from ..bench.schedule import run

    run(args.artefacts, args.budget, args.samples, args.out)


def _bench_concepts(args) -> None:
    from ..bench.concepts import run

    run(args.concepts, args.windows, args.repeats, args.text, args.out)


def _bench_compose(args) -> None:
    from ..bench.compose import run

    how = dict(testbed=args.testbed, seeds=args.seeds, retime=args.retime)
    run(args.samples, args.methods, args.out, args.cache_dir, **how)


def _bench_caf(args) -> None:
    from ..bench.caf import run

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


def add(commands) -> None:
    """Add the command to the others."""
    from ..bench.caf import CAF_DIR, CONTROL_DIR
    from ..bench.trial import ESTIMATORS as TRIED
    from ..testbed.book import CONCEPTS_DIR
    from ..testbed.experts import CONTROL_DIR as DENSE_ON_DIR
    from ..testbed.experts import EXPERTS_DIR
    from ..testbed.quadrants import VLM_DIR
    from ..testbed.vit import VIT_DIR

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

    sub = bench.add_parser("vit", help="fewer patches in 'shiva train vit's models: accuracy against patches and time")
    sub.add_argument("--samples", type=int, default=10000, help="test pictures")
    sub.add_argument("--repeats", type=int, default=15, help="timed pairs a row")
    sub.add_argument("--vit", default=VIT_DIR, help="folder of 'shiva train vit'")
    sub.add_argument("--data-dir", help="folder of the Fashion-MNIST .gz files")
    sub.add_argument("--out", default="results", help="folder of vit.json and vit.png")
    sub.set_defaults(run=_bench_vit)

    sub = bench.add_parser("concepts", help="bits a byte and time of 'shiva train concepts' models")
    sub.add_argument("--windows", type=int, default=400, help="of the held-out text")
    sub.add_argument("--repeats", type=int, default=15, help="timed pairs a variant")
    sub.add_argument("--concepts", default=CONCEPTS_DIR, help="folder of 'shiva train concepts'")
    sub.add_argument("--text", help="what was trained on; by default the book")
    sub.add_argument("--out", default="results", help="folder of concepts.json and concepts.png")
    sub.set_defaults(run=_bench_concepts)

    sub = bench.add_parser("pareto", help="every method at several strengths: quality against time, as a page")
    sub.add_argument("--testbed", default="fashion", help="fashion or emoji")
    sub.add_argument("--samples", type=int, help="images a cell; 1000, or 64 of one's own checkpoint")
    sub.add_argument("--methods", nargs="*", metavar="NAME", help="by default all; dense always runs")
    sub.add_argument("--seeds", type=int, default=1, help="of the noise; cells that have as many stay")
    sub.add_argument("--retime", action="store_true", help="time finished cells again, all in one sitting")
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
    sub.add_argument("--retime", action="store_true", help="time finished cells again, all in one sitting")
    sub.add_argument("--out", default="results", help="folder of compose.json, which finished cells are read from")
    sub.add_argument("--cache-dir", default="build/pareto", help="folder of the images")
    sub.set_defaults(run=_bench_compose)
    sub = bench.add_parser(
        "schedule", help="what a token more is worth by layer and noise level, and what is kept there"
    )
    sub.add_argument("--artefacts", nargs="+", metavar="FOLDER", help="of the first testbed; by default two that ship")
    sub.add_argument("--budget", type=float, help="all are moved to; by default each at its own")
    sub.add_argument("--samples", type=int, default=64, help="at each noise level")
    sub.add_argument("--out", default="results", help="folder of schedule.json")
    sub.set_defaults(run=_bench_schedule)
