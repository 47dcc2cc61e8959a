"""Writing files so that nobody ever sees half of one."""

import os
from pathlib import Path


def write_text(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, file)


def write_figure(figure, file: Path) -> None:
    """Write a matplotlib figure as a PNG file whole or not at all."""
    temporary = file.with_suffix(".tmp")
    figure.savefig(temporary, dpi=110, format="png")
    os.replace(temporary, file)
