"""What goes to which stream: progress and notes to stderr, results to stdout."""

from __future__ import annotations

import contextlib
import json
import sys
import time
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
    """Progress with time left on stderr: bars on a terminal, a line now and then elsewhere; or ``quiet``."""

    SECONDS_BETWEEN_LINES = 15.0

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self._bars = None

    @contextlib.contextmanager
    def bars(self) -> Iterator[Reporter]:
        """The bars live inside this block."""
        if self.quiet or not stderr().is_terminal:
            yield self
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Left

        columns = (
            TextColumn("{task.description:<8}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            Left(),
        )
        with Progress(*columns, console=stderr()) as self._bars:
            try:
                yield self
            finally:
                self._bars = None

    def track(self, label: str, total: int) -> Callback:
        """Progress of one run; the callback takes (steps done, steps in all)."""
        if self.quiet:
            return lambda done, total: None
        if self._bars is None:
            return self._lines(label)
        bars, task = self._bars, self._bars.add_task(label, total=total)
        return lambda done, total: bars.update(task, completed=done, total=total)

    def _lines(self, label: str) -> Callback:
        start = last = time.monotonic()

        def tell(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            spent = now - start
            if done == total:
                print(f"{label}: {total} of {total} in {spent:.0f} s", file=sys.stderr)
            elif now - last >= self.SECONDS_BETWEEN_LINES:
                last = now
                left = spent / done * (total - done)
                print(f"{label}: {done} of {total}, {left:.0f} s left", file=sys.stderr, flush=True)

        return tell

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """A spinner on a terminal, nothing elsewhere."""
        console = stderr()
        if self.quiet or not console.is_terminal:
            yield
            return
        with console.status(what):
            yield
