"""Plugging vdit_ext into diffusers. Importing this package does not import diffusers; using it does."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Explanation": ".diffusers",
    "Handle": ".diffusers",
    "MODELS": ".diffusers",
    "accelerate": ".diffusers",
    "explain": ".diffusers",
    "handle_of": ".diffusers",
    "load_pipeline": ".folder",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        home = import_module(_HOMES[name], __name__)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "diffusers":
            raise
        raise ImportError(
            f"{__name__}.{name}: diffusers is expected to be installed, it is not; run "
            "`pip install 'vdit-ext[video]'`"
        ) from error
    return getattr(home, name)
