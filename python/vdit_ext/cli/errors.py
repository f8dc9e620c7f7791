"""How a command ends: exit codes, and one sentence on stderr when it does not succeed."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import typer

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

EXIT_CODES = (
    "Exit codes: 0 done; 1 internal failure; 2 the request cannot be carried out (unknown word, method or "
    "option, unwritable path, unsupported model, missing package); 130 interrupted. VDIT_DEBUG=1 shows where a "
    "failure or a refusal comes from. Files are written beside their final name and renamed when all of them "
    "are complete, so that nothing half-written stays."
)


class Refusal(Exception):
    """A request that cannot be carried out: one sentence with what was expected, what came, what to do."""


@contextlib.contextmanager
def refusing(*kinds: type[Exception]) -> Iterator[None]:
    """Turn the ValueError (or ``kinds``) of a call that checks the user's input into a Refusal.

    For checks only: around work, it would pass a defect off as the user's mistake.
    """
    refused = kinds or (ValueError,)
    try:
        yield
    except refused as error:
        raise Refusal(str(error)) from error


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command end with the documented exit codes and one sentence on stderr."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except Refusal as error:
            _show_traceback()
            say(str(error))
            raise typer.Exit(BAD_INPUT) from None
        except KeyboardInterrupt:
            say("interrupted; no file was written.")
            raise typer.Exit(INTERRUPTED) from None
        except (typer.Exit, SystemExit):
            raise
        except BrokenPipeError:  # the reader of stdout has left, as `vdit ... | head` does
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            raise typer.Exit(FAILED) from None
        except Exception as error:
            _show_traceback()
            say(f"internal failure, {type(error).__name__}: {error}")
            raise typer.Exit(FAILED) from None

    return run


def _show_traceback() -> None:
    """Under VDIT_DEBUG=1, print the exception that is being handled and those behind it."""
    if os.environ.get("VDIT_DEBUG", "0") != "0":
        traceback.print_exc()


def say(sentence: str) -> None:
    """One line on stderr."""
    line = " ".join(sentence.split())
    print(f"vdit: {line if line.endswith(('.', '!', '?')) else line + '.'}", file=sys.stderr)
