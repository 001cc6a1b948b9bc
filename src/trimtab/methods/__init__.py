"""One file per method, in folders by space. Calling this package lists them: `trimtab.methods()`.

Importing any method makes Python bind `trimtab.methods` to this package, over the function of that name; so the package
answers the call itself.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any


class Methods(ModuleType):
    """A package that can be called like the function it would hide."""

    def __call__(self) -> Mapping[str, Any]:
        """Name -> class of every registered method."""
        found: Mapping[str, Any] = importlib.import_module("trimtab.catalog").methods()
        return found


sys.modules[__name__].__class__ = Methods
