"""A law: a function of a case that raises `Broken`, with a number, a name, and what it is checked on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from trimtab.laws.case import FP32, Case, excuses
from trimtab.laws.judging import Broken, NotApplicable

LAWS: list[Law] = []
"""All laws in order."""


@dataclass(frozen=True)
class Verdict:
    """What one law says of one case."""

    law: str
    case: str
    status: str
    """pass, fail, excused (broken, as the method says) or void (it does not apply here)."""
    detail: str = ""

    def __bool__(self) -> bool:
        return self.status != "fail"

    def __str__(self) -> str:
        return f"{self.status:8} {self.law:14} {self.case}" + (f": {self.detail}" if self.detail else "")


@dataclass(frozen=True)
class Law:
    """Call it with a case: it returns, or raises `Broken` or `NotApplicable`."""

    number: int
    name: str
    holds: Callable[[Case], None]
    storages: str = "fp32"
    """fp32; floats (bf16 too); kinds (and nf4); codes (quantized ones only); every."""
    thorough: bool = False
    """Whether it is checked only on hosts that are `thorough`."""
    host: str = ""
    """The one host it is checked on, where it brings its own sizes."""
    once: bool = False
    """Whether it speaks of the method alone, so that one case is enough."""
    slow: Callable[[Case], bool] = lambda case: False
    """Which cases take seconds. They are also those that depend on the host or format and hardly on the method."""

    def __call__(self, case: Case) -> None:
        self.holds(case)

    def speaks_of(self, case: Case) -> bool:
        """Whether this law is meant for a case's storage and host."""
        if (self.thorough and not case.host.thorough) or self.host not in ("", case.host.name):
            return False
        coded, name = case.storage.format is not None, case.storage.name
        return {
            "fp32": name == FP32.name,
            "floats": not coded,
            "kinds": not coded or name == "nf4",
            "codes": coded,
            "every": True,
        }[self.storages]

    def verdict(self, case: Case) -> Verdict:
        """Check a case. A law the method excuses itself from must be broken in fp32: a stale excuse is a fault."""
        excuse = excuses(case.method).get(self.name)
        told = Verdict(self.name, case.id, "pass")
        try:
            self(case)
        except NotApplicable as reason:
            return replace(told, status="void", detail=str(reason))
        except Exception as error:  # a crash breaks a law as well as a wrong number does
            if excuse is not None:
                return replace(told, status="excused", detail=excuse)
            detail = str(error) if isinstance(error, Broken) else f"{type(error).__name__}: {error}"
            return replace(told, status="fail", detail=detail)
        if excuse is not None and case.storage.name == FP32.name:
            return replace(told, status="fail", detail=f"it holds, so delete the exception: {excuse!r}")
        return told


def law(
    number: int,
    name: str,
    *,
    storages: str = "fp32",
    thorough: bool = False,
    host: str = "",
    once: bool = False,
    slow: Callable[[Case], bool] = lambda case: False,
) -> Callable[[Callable[[Case], None]], Law]:
    """Make a law of a function and list it."""

    def made(holds: Callable[[Case], None]) -> Law:
        one = Law(number, name, holds, storages, thorough, host, once, slow)
        object.__setattr__(one, "__doc__", holds.__doc__)
        LAWS.append(one)
        LAWS.sort(key=lambda item: item.number)
        return one

    return made
