"""Every law for every registered method, on every host and storage it declares; then presets and language models."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from language_models import hosts as language_models

from trimtab import laws, presets
from trimtab.core.method import Method

ORACLES = Path(__file__).parent.parent / "oracles"
METHODS = laws.registered()
ON_LANGUAGE_MODELS = {
    "fp32": ("identity", "trains_only", "merge", "detach", "save", "checkpointing", "stacks", "mixed", "copies"),
    "nf4": ("trains_only", "quantized", "checkpointing"),
}


UNREAD = {("untied", "trains_only", "bert")}
"""What a host has no use for: BERT's classifier reads the first token only, so in the last block an edit of the last
tokens reaches nothing and the tensors it has of its own get no gradient."""


def oracle_of(name: str) -> Callable[..., Any] | None:
    """The function `oracle` of tests/oracles/<name>.py, or None where there is no such file."""
    path = ORACLES / f"{name}.py"
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location(f"oracle_of_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.oracle


def points() -> dict[str, Any]:
    """Presets that are not simply a registered method with its defaults."""
    found = {}
    for name, make in inspect.getmembers(presets, inspect.isfunction):
        if name[0].isupper():
            made = laws.small(make())
            start = getattr(made, "begins", None)
            if start is not None and start.needs_format:
                continue  # it exists on weights that are about to be quantized only: tests/methods/test_starts.py
            if made not in METHODS.values():
                found[name] = made
    return found


def shown_elsewhere(name: str, law: laws.Law, case: laws.Case, pairs: list[tuple[laws.Law, laws.Case]]) -> bool:
    """Whether a case that takes long is left to another one, because nothing in it is particular to the method.

    Every method meets every host and every format, but not every host in every format. What a method adds to a graph is
    seen on one small host in fp32 and nf4, and what it does in a format on a single layer; what a format or a whole
    model adds does not depend on the method, so LoRA alone meets all formats on whole models.
    """
    usual = case.storage.name in ("fp32", "bf16", "nf4")
    if law.name == "compiles" and law.slow(case):
        if name == "lora":
            return case.oversized and not usual
        elsewhere = any(other is law and not law.slow(one) for other, one in pairs)
        return elsewhere or case.storage.name not in ("fp32", "nf4")
    if not case.oversized or name == "lora":
        return False
    parts = [one for other, one in pairs if other is law and not one.oversized and one.storage == case.storage]
    return bool(parts) and (law.name == "recovers" or not usual)


def parameters() -> list[Any]:
    """Every pair of a law and a case as a test of its own: method-law-host-storage."""
    formats = {storage.name: storage for storage in laws.storages()}
    few = [formats["fp32"], formats["nf4"]]
    found = []
    for name, method in METHODS.items():
        oracle = oracle_of(name)
        every = laws.work(method, oracle=oracle, slow=True)
        pairs = [
            (law, case)
            for law, case in every
            if law.name != "distributed"  # tests/laws/test_distributed.py starts its processes once for all methods
            and not shown_elsewhere(name, law, case, every)
        ]
        pairs += [
            (law, case)
            for law, case in laws.work(method, language_models(), few, oracle)
            if law.name in ON_LANGUAGE_MODELS[case.storage.name] and (name, law.name, case.host.name) not in UNREAD
        ]
        found += [(name, law, case) for law, case in pairs]
    for name, method in points().items():
        models = [host for host in laws.zoo() if host.kind == "model"]
        oracle = oracle_of(laws.case.title(method))
        found += [(name, law, case) for law, case in laws.work(method, models, few, oracle)]
    return [
        pytest.param(
            law,
            case,
            id=f"{name}-{law.name}-{case.host.name}-{case.storage.name}",
            marks=[pytest.mark.slow] if law.slow(case) else [],
        )
        for name, law, case in found
    ]


@pytest.mark.parametrize("law, case", parameters())
def test_law(law: laws.Law, case: laws.Case) -> None:
    verdict = law.verdict(case)
    assert verdict, f"{verdict.law} of {verdict.case}: {verdict.detail}"
    if verdict.status == "void":
        pytest.skip(verdict.detail)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_an_oracle(name: str) -> None:
    assert oracle_of(name) is not None, f"write the equation of {name} in NumPy: tests/oracles/{name}.py"


def test_excuses_name_laws() -> None:
    known = {law.name for law in laws.LAWS}
    for method in METHODS.values():
        assert isinstance(method, Method)
        assert set(method.laws) <= known, f"{type(method).__name__} excuses itself from a law that does not exist"
        assert all(reason for reason in method.laws.values())


def test_laws_are_numbered() -> None:
    assert [law.number for law in laws.LAWS] == list(range(1, 21))
    assert all(law.__doc__ for law in laws.LAWS)
