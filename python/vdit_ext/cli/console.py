"""What goes to which stream: progress and notes to stderr, results to stdout."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console

Callback = Callable[[int, int], None]


def stderr() -> Console:
    """Console for progress and notes."""
    return Console(stderr=True, highlight=False)


def stdout() -> Console:
    """Console for tables; figures are never cut, whatever the width that a pipe pretends to have."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=120)


def print_json(value: Any) -> None:
    """One JSON document on stdout; infinities and NaN are refused, since JSON has neither."""
    print(json.dumps(value, indent=2, allow_nan=False), file=sys.stdout)


class Reporter:
    """Progress bars with time left on stderr; silent when ``quiet``."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self._progress = None

    @contextlib.contextmanager
    def bars(self) -> Iterator[Reporter]:
        """The bars live inside this block."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Left

        progress = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            Left(elapsed_when_finished=False),
            console=stderr(),
            disable=self.quiet,
        )
        with progress:
            self._progress = progress
            try:
                yield self
            finally:
                self._progress = None

    def track(self, label: str, total: int) -> Callback:
        """A bar for one run; the callback takes (steps done, steps in all)."""
        progress = self._progress
        if progress is None:
            return lambda done, total: None
        task = progress.add_task(label, total=total)
        return lambda done, total: progress.update(task, completed=done, total=total)

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """A spinner on a terminal, nothing elsewhere."""
        console = stderr()
        if self.quiet or not console.is_terminal:
            yield
            return
        with console.status(what):
            yield
