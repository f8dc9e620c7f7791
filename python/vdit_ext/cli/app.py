"""The commands and their entry point."""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from .bench import bench
from .compare import compare
from .curve import curve
from .doctor import doctor
from .errors import EXIT_CODES, INTERRUPTED
from .generate import generate

app = typer.Typer(
    name="vdit",
    help="Sparse attention for video diffusion transformers: make clips, compare methods, measure, look into "
    "the installation. Without --model, everything runs on the toy model that comes with the package.",
    epilog=EXIT_CODES,
    rich_markup_mode="markdown",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for function in (generate, compare, curve, bench, doctor):
    app.command(epilog=EXIT_CODES)(function)


def _print_version(asked: bool) -> None:
    if asked:
        from .machine import version_of

        print(f"vdit-ext {version_of('vdit-ext') or '0+unknown'}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave."),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the ``vdit`` script."""
    # Ending by SIGTERM must clean up like Ctrl-C does.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
