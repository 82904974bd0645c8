"""The hooks that make a method (`base`), one short file per family, and all of them by name (`registry`)."""

from .base import Method
from .registry import METHODS

__all__ = ["METHODS", "Method"]
