"""The one exception of a package, besides `ValueError` for a bad argument."""

from __future__ import annotations


class ModelError(RuntimeError):
    """A package that cannot be used: altered, made for another machine or version, out of memory, or closed."""
