"""Plugging vdit_ext into diffusers. Importing this package does not import diffusers; using it does."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .._extras import needing

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
    with needing("diffusers", f"{__name__}.{name}"):
        home = import_module(_HOMES[name], __name__)
    return getattr(home, name)
