"""``shiva report``, ``shiva demo`` and ``shiva info``."""

import json


def _report_testbed(args) -> None:
    from ..testbed.report import report

    report(args.samples, args.seeds, args.cache_dir, args.out, args.rows or None)


def _report_emoji(args) -> None:
    from ..testbed.emoji_selection import report

    report(args.dense_model, args.selection, args.images)


def _demo(args) -> None:
    if args.prompts is not None:
        from ..testbed.emoji_demo import PROMPTS, run

        run(args.out, args.steps, args.prompts or PROMPTS)
        return
    from ..testbed.demo import run

    run(args.out, args.steps)


def _info(args) -> None:
    from .. import build_info

    print(json.dumps(build_info(), indent=1))


def add(commands) -> None:
    """Add the commands to the others."""
    from ..testbed.emoji_selection import ARTEFACT as EMOJI_ARTEFACT
    from ..testbed.emoji_selection import DENSE as EMOJI_DENSE

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
