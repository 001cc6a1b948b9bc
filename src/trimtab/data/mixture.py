"""Several data sets as one: which files, and how many rows of each an epoch has.

A mixture is a YAML file, either a list of sources or `temperature` beside `sources`:

    - path: alpaca.json
      weight: 2
    - path: e2e.csv.gz
      weight: 1
      columns: {prompt: mr, completion: ref}

An epoch has N rows, as many as all sources together. With weights w, source i has N·w_i/Σw of them; with neither
weights nor a temperature every row comes once; `temperature: T` weighs a source of n rows by n^(1/T) (arXiv 1910.10683,
section 3.5.2), so that 1 changes nothing and a large one makes sources alike. The rows of a source come in shuffled
passes that go on from epoch to epoch: none comes for the second time before each has come once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from trimtab.core.errors import UserError, listing, nearest
from trimtab.data.encoded import EncodedSet, Labels, Report
from trimtab.data.examples import Example
from trimtab.data.forms import Form, detect, examples
from trimtab.data.reading import Table, read

ENDINGS = (".yaml", ".yml")
KEYS = ("path", "weight", "columns")


@dataclass(frozen=True)
class Source:
    """One data set of those that are trained on."""

    name: str
    table: Table
    form: Form
    rows: list[Example]
    weight: float | None = None


@dataclass(frozen=True)
class Sources:
    """All of them, and how they are mixed."""

    parts: tuple[Source, ...]
    temperature: float | None = None

    @property
    def rows(self) -> list[Example]:
        """The examples of all of them."""
        return [row for one in self.parts for row in one.rows]

    @property
    def sha256(self) -> str:
        """Of the file; of several, of their names, bytes and weights."""
        if len(self.parts) == 1:
            return self.parts[0].table.sha256
        lines = [f"{one.name} {one.table.sha256} {one.weight}" for one in self.parts]
        return hashlib.sha256("\n".join([*lines, str(self.temperature)]).encode()).hexdigest()

    def holding(self, rows: Sequence[list[Example]]) -> Sources:
        """The same sources with other examples of theirs."""
        return replace(self, parts=tuple(replace(one, rows=some) for one, some in zip(self.parts, rows, strict=True)))

    def weights(self, sizes: Sequence[int]) -> list[float]:
        """The share of each in an epoch, up to a factor, where they have so many rows."""
        given = [one.weight for one in self.parts]
        if self.temperature is not None:
            return [size ** (1 / self.temperature) for size in sizes]
        return [float(size) if weight is None else weight for weight, size in zip(given, sizes, strict=True)]


def is_mixture(path: str | Path) -> bool:
    """Whether a path names a list of data sets rather than one."""
    return Path(path).suffix.lower() in ENDINGS


def gather(path: str | Path, columns: Mapping[str, str] | None = None) -> Sources:
    """The data set of a file, or those that a mixture lists; `columns` are for a single one."""
    if not is_mixture(path):
        table = read(path)
        form = detect(table, columns or None)
        return Sources((Source(str(path), table, form, examples(table, form)),))
    if columns:
        raise UserError(f"columns: {path} is a mixture", fix=f"give each source of {path} its own `columns`")
    listed, temperature = listed_in(Path(path))
    parts = []
    for one in listed:
        table = read(one["path"])
        form = detect(table, one.get("columns") or None)
        parts.append(Source(one["name"], table, form, examples(table, form), one.get("weight")))
    return Sources(tuple(parts), temperature)


def listed_in(path: Path) -> tuple[list[dict[str, Any]], float | None]:
    """The sources that a mixture lists, checked, their paths taken from its folder; and its temperature."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", fix="check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    temperature, problems = None, list[str]()
    if isinstance(content, Mapping):
        problems += [unknown(key, ("sources", "temperature"), "") for key in set(content) - {"sources", "temperature"}]
        temperature, content = content.get("temperature"), content.get("sources")
        if temperature is not None and not positive(temperature):
            problems.append(f"temperature is {temperature!r}, not a number above 0")
    if not isinstance(content, list) or not content:
        problems.append("no sources are listed")
        content = []
    found = [source_of(one, at, path.parent, problems) for at, one in enumerate(content, 1)]
    weighed = [one for one in found if "weight" in one]
    if weighed and len(weighed) < len(found):
        problems.append(f"{len(weighed)} of {len(found)} sources have a weight: all or none")
    if weighed and temperature is not None:
        problems.append("weights and a temperature say the same thing twice")
    names = [one["name"] for one in found if "name" in one]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"{listing(twice)} is listed twice: give it a larger weight")
    if problems:
        raise UserError(
            f"{path}: a mixture of data sets, but " + "; ".join(problems),
            fix="a list of `- path: FILE` with `weight: 2` and `columns: {prompt: a, completion: b}` where wanted",
        )
    return found, None if temperature is None else float(temperature)


def source_of(value: Any, number: int, folder: Path, problems: list[str]) -> dict[str, Any]:
    """One entry of a mixture, its path as it can be opened; what is wrong goes to the problems."""
    entry = {"path": value} if isinstance(value, str) else value
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
        problems.append(f"source {number} has no path")
        return {}
    found = {"name": entry["path"], **{key: entry[key] for key in KEYS if entry.get(key) is not None}}
    problems += [unknown(key, KEYS, f" of source {number}") for key in entry if key not in KEYS]
    if is_mixture(entry["path"]):
        problems.append(f"source {number} is a mixture itself")
    if "weight" in found and not positive(found["weight"]):
        problems.append(f"the weight of source {number} is {found['weight']!r}, not a number above 0")
    columns = found.get("columns", {})
    if not isinstance(columns, Mapping) or not all(isinstance(one, str) for one in chain(columns, columns.values())):
        problems.append(f"the columns of source {number} are no mapping of roles to names")
    beside = folder / entry["path"]
    return found | {"path": str(beside if beside.exists() or not Path(entry["path"]).exists() else entry["path"])}


def unknown(key: Any, known: Sequence[str], where: str) -> str:
    """What is said of a key that nobody reads."""
    near = nearest(str(key), known, 1)
    return f"nobody reads {key!r}{where}" + (f" (nearest: {near[0]})" if near else "")


def positive(value: Any) -> bool:
    """Whether a value is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def apportioned(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in whole parts as near to the weights as can be: the largest remainders are rounded up."""
    exact = [total * weight / sum(weights) for weight in weights]
    parts = [int(one) for one in exact]
    order = sorted(range(len(exact)), key=lambda at: (parts[at] - exact[at], at))
    for at in order[: total - sum(parts)]:
        parts[at] += 1
    return parts


@dataclass(frozen=True)
class Mixed(EncodedSet):
    """The sequences of several sources one after the other, and how many of each an epoch has."""

    names: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    amounts: tuple[int, ...] = ()

    def drawn(self, seed: int, epoch: int) -> list[int]:
        """The indices of an epoch, source after source: of each the next `amounts` of its shuffled passes."""
        found: list[int] = []
        for source, (start, size, amount) in enumerate(zip(self.starts, self.sizes, self.amounts, strict=True)):
            at, end = epoch * amount, (epoch + 1) * amount
            while at < end:
                turn, place = divmod(at, size)
                order = list(range(start, start + size))
                random.Random(f"{seed}/{source}/{turn}").shuffle(order)
                found += order[place : place + end - at]
                at += min(size - place, end - at)
        return found

    @property
    def starts(self) -> list[int]:
        """Where each source begins."""
        return [0, *accumulate(self.sizes)][:-1]

    def part(self, source: int) -> EncodedSet:
        """The sequences of one source."""
        start = self.starts[source]
        return EncodedSet(self.items[start : start + self.sizes[source]], self.report, self.labels)

    def name_of(self, index: int) -> str:
        """Where a sequence came from."""
        return f"{self[index].row} of {self.names[bisect_right(self.starts, index) - 1]}"


def row_name(rows: Sequence[Any], index: int) -> str:
    """The row of its file that a sequence was; of a mixture, with the file."""
    return rows.name_of(index) if isinstance(rows, Mixed) else str(rows[index].row)


def shares_in(rows: Sequence[Any]) -> list[str]:
    """A line for each source of a mixture: how many of the rows of an epoch are its own."""
    if not isinstance(rows, Mixed):
        return []
    parts = zip(rows.names, rows.sizes, rows.amounts, strict=True)
    return [f"{name}: {share_of(amount, sum(rows.amounts), size)}" for name, size, amount in parts]


def share_of(amount: int, whole: int, size: int) -> str:
    """How much of an epoch is a source's own, for people."""
    return f"{amount:,} of {whole:,} rows an epoch ({amount / whole:.0%}), it has {size:,}"


def rows_per_epoch(rows: Sequence[Any]) -> int:
    """How many sequences an epoch has."""
    return sum(rows.amounts) if isinstance(rows, Mixed) else len(rows)


def joined(sets: Sequence[EncodedSet], sources: Sources, labels: Labels | None) -> EncodedSet:
    """Encoded sources as one set; a single one stays what it is."""
    if len(sets) == 1:
        return sets[0]
    sizes = tuple(map(len, sets))
    amounts = apportioned(sum(sizes), sources.weights(sizes))
    if 0 in amounts:
        least = sources.parts[amounts.index(0)].name
        raise UserError(
            f"mixture: by its weight {least} has not one row in an epoch of {sum(sizes)}", fix="weigh it more"
        )
    names = tuple(one.name for one in sources.parts)
    report = together([one.report for one in sets], names)
    return Mixed(tuple(chain.from_iterable(sets)), report, labels, names, sizes, tuple(amounts))


def together(reports: Sequence[Report], names: Sequence[str]) -> Report:
    """One report of several: counts add up, notes say whose they are; the fingerprint is that of a chat template."""
    longest = max(reports, key=lambda one: one.longest)
    worded = next((one for one in reports if one.template == "chat"), reports[0])
    counted = ("longest", "longest_row", "max_length")
    sums = {
        field.name: sum(getattr(one, field.name) for one in reports)
        for field in dataclasses.fields(Report)
        if field.name not in counted and isinstance(getattr(longest, field.name), int)
    }
    notes = tuple(f"{name}: {note}" for name, one in zip(names, reports, strict=True) for note in one.notes)
    return replace(worded, **sums, longest=longest.longest, longest_row=longest.longest_row, notes=notes)
