"""The commands and their entry point."""

from __future__ import annotations

import signal
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .bench import bench
from .compare import compare
from .curve import curve
from .doctor import doctor
from .errors import BAD_INPUT, EXIT_CODES, INTERRUPTED, OK, say
from .generate import generate
from .quantize import quantize


class Commands(TyperGroup):
    """The group of commands; a wrong command line ends with one sentence, as every other refusal does."""

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        """As the parent's; the parent would print a usage box of many lines."""
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **kwargs)
        try:
            code = super().main(*args, standalone_mode=False, **kwargs)
        except (KeyboardInterrupt, typer.Abort):
            sys.exit(INTERRUPTED)
        except Exception as error:
            # Usage errors, whose class is typer's own or click's, depending on the version of typer.
            if not hasattr(error, "format_message"):
                raise
            context = getattr(error, "ctx", None)
            path = "vdit" if context is None else context.command_path
            say(f"{error.format_message().rstrip('.')}; `{path} --help` lists what is expected.")
            sys.exit(BAD_INPUT)
        sys.exit(code if isinstance(code, int) else OK)


app = typer.Typer(
    name="vdit",
    cls=Commands,
    help="Sparse attention and quantized weights for video diffusion transformers: make clips, compare "
    "methods, quantize, measure, look into the installation. Without --model, everything runs on the toy "
    "model that comes with the package.",
    epilog=EXIT_CODES,
    rich_markup_mode="markdown",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for function in (generate, compare, curve, quantize, bench, doctor):
    app.command(epilog=EXIT_CODES)(function)


def _print_version(asked: bool) -> None:
    if asked:
        from .machine import version_of

        print(f"vdit-ext {version_of('vdit-ext') or '0+unknown'}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave."),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """Entry point of the ``vdit`` script."""
    # Ending by SIGTERM must clean up like Ctrl-C does.
    signal.signal(signal.SIGTERM, _interrupt)
    app(prog_name="vdit")


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
