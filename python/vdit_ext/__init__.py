"""Kernels and pipelines for video diffusion transformers."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("vdit-ext")
except PackageNotFoundError:  # running from a source tree that was built in place
    __version__ = "0+unknown"

from . import ops

__all__ = ["__version__", "ops"]
