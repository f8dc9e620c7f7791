"""The ``vdit`` command. Importing this package imports no torch, so that ``vdit --help`` answers at once."""

from .app import app, main

__all__ = ["app", "main"]
