"""Options of a command line from a dataclass of settings."""

import argparse
from dataclasses import MISSING, fields


def add_config(parser: argparse.ArgumentParser, config) -> None:
    """One option per field of a configuration, with its value as the default."""
    for field in fields(config):
        default = getattr(config, field.name, field.default if field.default is not MISSING else None)
        kind = truth if isinstance(default, bool) else type(default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=default, help=str(default))


def config_of(args: argparse.Namespace, cls):
    return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


def truth(text: str) -> bool:
    """ "true" and "false", which bool() would both take for true."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}, wanted true or false")
    return text.lower() == "true"
