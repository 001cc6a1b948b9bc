"""Planning: what a recipe needs, before anything is loaded. `trimtab.plan(...)` is `trimtab.plan.planning.plan`."""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trimtab.plan.planning import Plan
    from trimtab.train.recipe import Recipe


class _Verb(types.ModuleType):
    """This package, which the public face also has as a verb."""

    def __call__(self, recipe: Recipe, *, fit: str | None = None, completions: float = 1.0) -> Plan:
        """Memory, operations, size and switching time of a recipe on a model known by its `config.json` alone.

        The recipe needs no data: rows are taken to be all `max_length` tokens long (default 512), and the last
        `completions` share of each is trained. `fit` is a size (24GB) or a device (rtx4090); default: this machine.
        Errors: `UserError`, as for `tune`.
        """
        from trimtab.plan.planning import plan

        return plan(recipe, fit=fit, completions=completions)


# `import trimtab.plan` sets the name `trimtab.plan` to this module, so the module has to be what can be called.
sys.modules[__name__].__class__ = _Verb
