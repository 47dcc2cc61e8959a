"""``shiva train | calibrate | tune | bench | report | demo | info``."""

import argparse
import sys

from .commands import bench, show, tools, train


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    root = argparse.ArgumentParser(prog="shiva", description=__doc__)
    commands = root.add_subparsers(required=True, dest="command")
    for module in (train, tools, bench, show):
        module.add(commands)
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
