"""Trimtab fine-tunes a large pretrained model by training a little of it.

    import trimtab as tt
    tt.attach(model, tt.LoRA(rank=16), where="q, v")

Names are imported when they are first used; methods, storage formats and presets are found by name in their folders.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0.dev0"

_HOME = {
    "attach": "core.attach",
    "detach": "core.attach",
    "activate": "core.attach",
    "merge": "core.merge",
    "save": "core.save",
    "load": "interop.load",
    "combine": "interop.combine",
    "quantize": "core.quantized",
    "dequantize": "core.quantized",
    "calibrate": "core.calibrate",
    "as_lora": "core.as_lora",
    "activations": "core.activations",
    "covariance": "core.fisher",
    "fisher": "core.fisher",
    "gradient": "core.fisher",
    "hardest_fisher": "core.fisher",
    "prune": "core.prune",
    "select": "core.select",
    "Method": "core.method",
    "WeightMethod": "core.method",
    "HiddenMethod": "core.method",
    "InputMethod": "core.method",
    "Site": "core.site",
    "Base": "core.site",
    "Format": "core.format",
    "Transform": "core.transform",
    "Optimizer": "core.optimizer",
    "Active": "core.active",
    "Activity": "core.active",
    "Start": "core.start",
    "UserError": "core.errors",
    "register": "core.registry",
    "methods": "catalog",
    "starts": "catalog",
    "describe": "catalog",
    "formats": "catalog",
    "presets": "presets",
    "laws": "laws",
    "plan": "plan",
    "Recipe": "train.recipe",
    "tune": "train.run",
    "search_prompt": "train.prompt_search",
    "Setup": "compare.setup",
    "compare": "compare.contest",
}
"""Public name -> module that defines it. Methods, formats and presets come from their folders instead."""

_MODULES = ("presets", "laws", "plan")
"""Public names that are modules themselves; `plan` is one that can be called."""

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    import importlib

    if name in _HOME:
        module = importlib.import_module(f"trimtab.{_HOME[name]}")
        return module if name in _MODULES else getattr(module, name)
    if name[:1].isupper():
        from trimtab.core.errors import UserError
        from trimtab.core.registry import find

        presets = importlib.import_module("trimtab.presets")
        for kind in ("start", "presets", "methods", "storage", "optim", "active"):
            try:
                return getattr(presets, name) if kind == "presets" else find(name, kind)
            except (UserError, AttributeError):
                continue
    raise AttributeError(f"module 'trimtab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
