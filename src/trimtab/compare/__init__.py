"""A fair contest of methods on the user's own model, data and machine: `trimtab.compare(Setup(...), "contest/")`.

Importing a part of it makes Python bind `trimtab.compare` to this package, over the function of that name; so the
package answers the call itself.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class Compare(ModuleType):
    """A package that can be called like the function it would hide."""

    def __call__(self, setup: Any, folder: Any, watcher: Any = None) -> dict[str, Any]:
        """Hold a contest in a directory: see `trimtab.compare.contest.compare`."""
        found: dict[str, Any] = importlib.import_module("trimtab.compare.contest").compare(setup, folder, watcher)
        return found


sys.modules[__name__].__class__ = Compare
