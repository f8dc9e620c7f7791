"""Kernels and pipelines for video diffusion transformers.

Importing the package loads the op libraries, so that ``torch.ops.vdit`` is ready. What needs diffusers is
imported when it is first used.
"""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("vdit-ext")
except PackageNotFoundError:  # running from a source tree that was built in place
    __version__ = "0+unknown"

_LAZY = {
    "ops": ("ops", None),
    "VditQuantConfig": ("integrations", "VditQuantConfig"),
    "accelerate": ("integrations", "accelerate"),
    "explain": ("integrations", "explain"),
    "load_pipeline": ("integrations", "load_pipeline"),
    "quant": ("quant", None),
    "sparse": ("sparse", None),
    "toyworld": ("toyworld", None),
}

__all__ = [
    "VditQuantConfig",
    "__version__",
    "accelerate",
    "explain",
    "load_pipeline",
    "ops",
    "quant",
    "sparse",
    "toyworld",
]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module_name, attribute = _LAZY[name]
    module = import_module(f".{module_name}", __name__)
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


# The command `vdit` loads torch and the libraries when it needs them: its help is then immediate, and its
# doctor can report a library that does not load.
if "torch" in sys.modules or not sys.argv or sys.argv[0].rpartition("/")[2] != "vdit":
    from . import ops
