"""``shiva train``."""

import argparse
import json
from dataclasses import asdict, fields

from .options import add_config, config_of, truth


def _train(args) -> None:
    """On one's own model and images."""
    from ..training.config import TrainConfig, read_config

    names = {field.name for field in fields(TrainConfig)}
    config = read_config(args.config, **{name: value for name, value in vars(args).items() if name in names})
    if args.print_config:
        import yaml

        print(yaml.safe_dump(asdict(config), sort_keys=False), end="")
        return
    missing = [f"--{name}" for name in ("model", "data", "out") if getattr(args, name) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing; wanted shiva train --model FOLDER --data FOLDER --out FOLDER")
    from ..training.fit import fit

    out = fit(args.model, args.data, args.out, config, args.revision, args.resume)
    print(f"done: shiva_ext.enable(pipe, {str(out)!r}); the training is shown in {out / 'report.html'}")


def _add_train_options(parser: argparse.ArgumentParser) -> None:
    from ..training.config import TrainConfig

    parser.add_argument("--model", help="folder of a diffusers pipeline, or a hub id with --revision")
    parser.add_argument("--revision", help="commit of a hub id")
    parser.add_argument("--data", help="folder of images with captions: a .txt beside each, or a metadata.jsonl")
    parser.add_argument("--out", help="folder for the artefact, its encodings and checkpoints")
    parser.add_argument("--config", help="YAML file of settings; options given here come before it")
    parser.add_argument("--print-config", action="store_true", help="show all settings as YAML, and stop")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    for field in fields(TrainConfig):
        kind = truth if isinstance(field.default, bool) else type(field.default)
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=kind, default=argparse.SUPPRESS, help=f"default {field.default}")
    parser.set_defaults(run=_train)


def _train_dense(args) -> None:
    from ..testbed.dense import DenseConfig, train

    train(config_of(args, DenseConfig), args.out, args.data_dir)


def _train_emoji(args) -> None:
    from ..testbed.emoji import DenseConfig, train

    train(config_of(args, DenseConfig), args.out)


def _train_emoji_selection(args) -> None:
    from ..testbed.emoji_selection import train
    from ..training.config import TrainConfig

    train(config_of(args, TrainConfig), args.out, args.dense_model, args.resume)


def _train_emoji_classifier(args) -> None:
    from ..testbed.emoji_classifier import EmojiClassifierConfig, train

    record = train(config_of(args, EmojiClassifierConfig), args.out)
    print(json.dumps({k: v for k, v in record.items() if k != "captions"}, indent=1))


def _train_classifier(args) -> None:
    from ..testbed.classifier import ClassifierConfig, train

    print(json.dumps(train(config_of(args, ClassifierConfig), args.out, args.data_dir), indent=1))


def _train_caf(args, rectified_flow: bool = False) -> None:
    from ..caf.fashion import train
    from ..caf.train import CAFConfig

    place = args.out, args.pairs, args.pairs_dir, args.dense_model
    folder = train(config_of(args, CAFConfig), *place, resume=args.resume, rectified_flow=rectified_flow)
    print(f"done: {folder}; 'shiva bench caf' compares it")


def _train_rectified_flow(args) -> None:
    _train_caf(args, rectified_flow=True)


def _train_experts(args) -> None:
    from ..testbed.experts import ExpertsConfig, train

    train(config_of(args, ExpertsConfig), args.out, args.dense_model, args.data_dir, args.control)


def _train_vlm(args) -> None:
    from ..testbed.quadrants import VLMConfig, train

    train(config_of(args, VLMConfig), args.out, args.data_dir)


def _train_vit(args) -> None:
    from ..testbed.vit import ViTTrainConfig, train

    train(config_of(args, ViTTrainConfig), args.out, args.methods, args.data_dir)


def _train_concepts(args) -> None:
    from ..testbed.book import TextConfig, train

    train(config_of(args, TextConfig), args.out, args.variants, args.text)


def _train_testbed(args) -> None:
    from ..testbed.train_shiva import train
    from ..training.config import TrainConfig

    train(config_of(args, TrainConfig), args.out, args.dense_model, args.data_dir, args.control, args.resume)


def add(commands) -> None:
    """Add the command to the others."""
    from ..caf.fashion import CONFIG as CAF_CONFIG
    from ..caf.fashion import PAIRS, PAIRS_DIR
    from ..testbed.book import TextConfig
    from ..testbed.classifier import ClassifierConfig
    from ..testbed.dense import DenseConfig
    from ..testbed.emoji import CONFIG as EMOJI_CONFIG
    from ..testbed.emoji_classifier import EmojiClassifierConfig
    from ..testbed.emoji_selection import CONFIG as EMOJI_SELECTION_CONFIG
    from ..testbed.emoji_selection import DENSE as EMOJI_DENSE
    from ..testbed.experts import ExpertsConfig
    from ..testbed.quadrants import VLMConfig
    from ..testbed.train_shiva import TESTBED_CONFIG
    from ..testbed.vit import ViTTrainConfig

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
        ("vit", _train_vit, ViTTrainConfig(), "a small vision transformer, and the ways to prune its patches"),
        ("concepts", _train_concepts, TextConfig(), "small language models of a book, with and without concepts"),
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
        elif name == "concepts":
            sub.add_argument("--variants", nargs="+", metavar="NAME", help="some of the variants; by default all")
            sub.add_argument("--text", help="any text; by default Debian's bible-kjv")
        elif not name.startswith("emoji"):
            sub.add_argument("--data-dir", help="folder of the Fashion-MNIST .gz files")
        add_config(sub, config)
        if name == "testbed":
            sub.add_argument("--dense-model", help="dense model's folder; by default the one that ships")
            sub.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
            sub.add_argument("--control", action="store_true", help="fine-tune densely instead, as the control")
        if name == "vit":
            sub.add_argument("--methods", nargs="+", metavar="NAME", help="some of the ways to prune; by default all")
        if name == "experts":
            sub.add_argument("--dense-model", help="where to start; by default the one that ships")
            sub.add_argument("--control", action="store_true", help="train the dense model on instead, as the control")
        sub.set_defaults(run=run)
