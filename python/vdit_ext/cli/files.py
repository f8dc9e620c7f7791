"""Output files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import Refusal


def check_file(path: Path, suffix: str, *companions: Path) -> Path:
    """Refuse, in one sentence, a path that cannot be written; called before any work is done.

    ``companions`` are files that will be written in the same folder.
    """
    if path.suffix.lower() != suffix:
        raise Refusal(f"--out: a file name ending in {suffix} was expected, got {str(path)!r}")
    for one in (path, *companions):
        if one.is_dir():
            raise Refusal(f"--out: a file was expected, {str(one)!r} is a folder; choose another name")
    _probe(path.parent, path)
    return path


def check_folder(path: Path) -> Path:
    """Refuse, in one sentence, a folder that can neither be filled nor made; nothing is made yet."""
    if path.exists() and not path.is_dir():
        raise Refusal(f"--out: a folder was expected, {str(path)!r} is a file; name another folder")
    _probe(path if path.is_dir() else path.absolute().parent, path)
    return path


def check_own_folder(path: Path, *marks: str) -> Path:
    """As :func:`check_folder`, for a folder that the user did not name.

    It must be absent, empty or, as the files ``marks`` in it tell, of an earlier run.
    """
    check_folder(path)
    if path.is_dir() and any(path.iterdir()) and not all((path / mark).is_file() for mark in marks):
        raise Refusal(
            f"--out: no folder {str(path)!r}, or one of an earlier run, was expected, there is one with other "
            "files; name a folder with --out"
        )
    return path


def _probe(folder: Path, target: Path) -> None:
    if not folder.is_dir():
        raise Refusal(
            f"--out: the folder of {str(target)!r} was expected to exist, it does not; make it with mkdir -p"
        )
    probe = folder / f".vdit-{secrets.token_hex(4)}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise Refusal(
            f"--out: {str(target)!r} was expected to be writable, it is not ({reason}); choose another path"
        ) from None


@contextlib.contextmanager
def staged_files(*targets: Path) -> Iterator[list[Path]]:
    """Temporary names beside ``targets``, with the same suffixes; renamed to them when the block succeeds.

    When the block raises, whatever kind of exception, the temporary files are removed and the targets stay
    as they were.
    """
    temporary = [t.with_name(f".{t.stem}-{secrets.token_hex(4)}{t.suffix}") for t in targets]
    try:
        yield temporary
        for source, target in zip(temporary, targets, strict=True):
            if source.exists():
                os.replace(source, target)
    finally:
        for source in temporary:
            source.unlink(missing_ok=True)


@contextlib.contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` whose files move into it when the block succeeds.

    Files of other names that ``target`` already holds stay. When the block raises, the temporary folder is
    removed and ``target`` stays as it was, or absent.
    """
    target = target.absolute()
    temporary = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    # An existing folder may stand in one that we cannot write to: stage inside it.
    if target.is_dir():
        temporary = target / temporary.name
    try:
        temporary.mkdir()
        yield temporary
        if target.is_dir():
            for source in sorted(temporary.iterdir()):
                os.replace(source, target / source.name)
        else:
            os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
