"""Compiled operators for distillation and distilled inference."""

from importlib.metadata import PackageNotFoundError, version

from pydistill import _native as _native

try:
    __version__ = version("pydistill-kernels")
except PackageNotFoundError:  # a source tree on sys.path, not installed
    __version__ = "0+unknown"
