"""The packages of the ``video`` extra, which are imported where they are used and may be missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_PACKAGES = {"PIL": "pillow"}


def package_of(module: str) -> str:
    """What to install for a top-level module."""
    return _PACKAGES.get(module, module)


@contextmanager
def needing(module: str, user: str) -> Iterator[None]:
    """Around imports that need a top-level module.

    Args:
        module: its name; that only a part of it is missing counts too.
        user: what needs it; the sentence begins so.

    Raises:
        ImportError: one sentence that says what to install, where the module is not there.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != module:
            raise
        raise ImportError(
            f"{user}: {package_of(module)} is expected to be installed, it is not; run "
            "`pip install 'vdit-ext[video]'`"
        ) from error
