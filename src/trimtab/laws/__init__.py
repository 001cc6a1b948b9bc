"""The laws: what every method is tested for, for free. `trimtab.laws.check(MyMethod())` tells what holds and what not.

 1 identity       attaching changes no output
 2 trains_only    a step moves every declared tensor and no bit of the base
 3 merge          merged = unmerged
 4 detach         restores bits, flags, classes and hooks
 5 save           own keys only, bit exact; every mismatch is named and changes nothing
 6 count          trained values = the formula, on the meta device too
 7 quantized      gradients on codes = on decoded weights; each merge policy keeps its word
 8 dtype          tensors and outputs follow the base; no activation in fp32 under bf16
 9 checkpointing  recomputed gradients are equal
10 compiles       in one graph, equal
11 distributed    DDP and FSDP2 on two ranks are equal to one process
12 stacks         two adapters compose
13 mixed          one adapter per row = a loop over rows
14 deterministic  the start depends on (seed, site name) only
15 oracle         the paper's equation in NumPy float64, to 1e-10
16 recovers       learns a target made by the same method
17 copies         pickle and deepcopy
18 cost           a forward builds nothing of the weight's size
19 docstring      equation, shapes, start, cost, mergeable or not, reference
20 in_place       what a place gives can be changed in place, as models may do

A law a method cannot obey is data on it, with the reason: `laws = {"merge": "the GELU in between"}`. It must then be
broken: an excuse for a law that holds is a fault too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from trimtab.core.part import Attachable
from trimtab.laws import distributed, function, numbers, paper, running, state
from trimtab.laws.case import Case, Storage, cases, registered, small, storages
from trimtab.laws.hosts import Host, zoo
from trimtab.laws.judging import Broken, NotApplicable
from trimtab.laws.law import LAWS, Law, Verdict

__all__ = [
    "LAWS",
    "Broken",
    "Case",
    "Host",
    "Law",
    "NotApplicable",
    "Storage",
    "Verdict",
    "cases",
    "check",
    "distributed",
    "function",
    "numbers",
    "paper",
    "registered",
    "running",
    "small",
    "state",
    "storages",
    "work",
    "zoo",
]


def check(
    method: Attachable,
    *,
    hosts: Iterable[Host] | None = None,
    storages: Iterable[Storage] | None = None,
    oracle: Callable[..., Any] | None = None,
    slow: bool = False,
) -> list[Verdict]:
    """Check every law on every fitting host and storage; `[v for v in check(m) if not v]` are the faults.

    The method's settings must suit tiny hosts: `small(method)` makes them so. `oracle` is its equation in NumPy, as
    `trimtab.laws.paper` says; without one the oracle law is broken. `slow` adds what takes seconds: compiling whole
    models, starting processes.
    """
    return [law.verdict(case) for law, case in work(method, hosts, storages, oracle, slow=slow)]


def work(
    method: Attachable,
    hosts: Iterable[Host] | None = None,
    formats: Iterable[Storage] | None = None,
    oracle: Callable[..., Any] | None = None,
    *,
    slow: bool = False,
) -> list[tuple[Law, Case]]:
    """Every pair of a law and a case that `check` goes over."""
    import dataclasses

    found = [dataclasses.replace(case, oracle=oracle) for case in cases(method, hosts, formats)]
    pairs = []
    for law in LAWS:
        fitting = [case for case in found if law.speaks_of(case) and (slow or not law.slow(case))]
        pairs += [(law, case) for case in (fitting[:1] if law.once else fitting)]
    return pairs
