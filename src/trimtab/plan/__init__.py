"""Planning: what a recipe needs, before anything is loaded. `trimtab.plan(...)` is `trimtab.plan.planning.plan`."""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.plan.planning import Plan


class _Verb(types.ModuleType):
    """This package, which the public face also has as a verb."""

    def __call__(self, model: str, **recipe: Any) -> Plan:
        """Memory, operations, size and switching time of a recipe on a model known by its `config.json`.

        `recipe` has the fields of a recipe (`method="lora", rank=16, batch_size=4, max_length=512`) and `fit`, a size
        or a device. Errors: `UserError`, as for a recipe.
        """
        from trimtab.plan.planning import plan

        return plan(model, **recipe)


sys.modules[__name__].__class__ = _Verb
