"""What a training run shows: a bar and a live table on a terminal, lines of JSON elsewhere."""

import json
import sys
import time
from collections.abc import Callable

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


class PlainDisplay:
    """One line of JSON for each entry of the history.

    Args:
        quiet: show nothing at all.
    """

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.listeners: list[Callable[[dict], None]] = []  # get each entry of the history, too

    def encoding(self, done: int, total: int) -> None:
        """Images and captions are being encoded."""
        if not self.quiet and (done == total or done % 64 == 0):
            print(f"encoded {done} of {total} images", flush=True)

    def stage(self, name: str, start: int, steps: int, batch_size: int) -> None:
        """A stage begins, or goes on after ``start`` steps."""
        if not self.quiet:
            print(
                f"{name} stage: {steps} steps of {batch_size}" + (f", from step {start}" if start else ""), flush=True
            )

    def step(self, done: int, record: dict | None, kept: dict[int, int]) -> None:
        """A step is done; ``kept`` holds the last call's tokens by layer, record is None for a skipped step."""

    def log(self, entry: dict) -> None:
        """An entry of the history: means since the last one."""
        for listener in self.listeners:
            listener(entry)
        if not self.quiet:
            print(json.dumps(entry), flush=True)

    def warn(self, text: str) -> None:
        """Something went wrong that the run survives."""
        if not self.quiet:
            print(f"shiva: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """The run is over."""


class LiveDisplay(PlainDisplay):
    """A progress bar with the time left, and a table of the latest means and the kept tokens of each layer."""

    def __init__(self):
        super().__init__()
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        )
        self.entries: list[dict] = []
        self.kept: dict[int, int] = {}
        self.rate = 0.0
        self.live = Live(self.render(), refresh_per_second=2)
        self.live.start()

    def encoding(self, done, total):
        self.live.update(f"encoded {done} of {total} images")

    def stage(self, name, start, steps, batch_size):
        self.batch_size, self.begun, self.first = batch_size, time.monotonic(), start
        self.task = self.progress.add_task(f"{name} stage", total=steps, completed=start)

    def step(self, done, record, kept):
        self.kept = kept
        self.rate = (done - self.first) * self.batch_size / max(time.monotonic() - self.begun, 1e-9)
        self.progress.update(self.task, completed=done)
        self.live.update(self.render())

    def log(self, entry):
        for listener in self.listeners:
            listener(entry)
        self.entries = [*self.entries[-9:], entry]

    def warn(self, text):
        self.live.console.print(f"[yellow]{text}[/yellow]")

    def close(self):
        self.live.stop()

    def render(self) -> Group:
        """What stands on the terminal now."""
        names = list(dict.fromkeys(name for entry in self.entries for name in entry))
        table = Table(title=f"{self.rate:.1f} images/s")
        for name in names:
            table.add_column(name)
        for entry in self.entries:
            table.add_row(*(str(entry.get(name, "")) for name in names))
        kept = " ".join(f"L{layer} {k}" for layer, k in self.kept.items())
        return Group(self.progress, table, f"kept tokens: {kept}")


def make_display(main: bool) -> PlainDisplay:
    """The display that fits where the output goes; only the main process shows anything."""
    if not main:
        return PlainDisplay(quiet=True)
    return LiveDisplay() if sys.stdout.isatty() else PlainDisplay()
