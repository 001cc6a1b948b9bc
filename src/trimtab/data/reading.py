"""Reading one data file into a table of rows, with the line each row stands on."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.core.errors import UserError, listing, nearest

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".txt": "txt",
}
"""File name ending (before an optional `.gz`) to the kind of file."""


@dataclass(frozen=True)
class Table:
    """The rows of one file, in file order; `columns` are all the keys met, in order of first appearance."""

    rows: list[dict[str, object]]
    path: Path
    kind: str
    sha256: str
    """Of the file's bytes as they lie on disk, so of the compressed ones for a `.gz`."""
    columns: tuple[str, ...]
    lines: tuple[int, ...] = ()
    """The line (from 1) on which each row starts; empty where the kind has no lines (parquet, wrapped json)."""

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        """`row 3 (line 17)`: how a person finds row `index` (from 0) in the file."""
        return f"row {index + 1} (line {self.lines[index]})" if self.lines else f"row {index + 1}"


class _Rows:
    """What a reader of one kind collects: rows, the line of each, and the columns when a header fixes them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, object]] = []
        self.lines: list[int] = []
        self.columns: list[str] | None = None
        self.problems: list[str] = []
        self.fix: str | None = None

    def add(self, row: dict[str, object], line: int | None) -> None:
        self.rows.append(row)
        if line is not None:
            self.lines.append(line)


def read(path: str | Path, *, kind: str | None = None, header: bool = True) -> Table:
    """Read a jsonl, json, csv, tsv, parquet or txt file, plain or gzipped, into a `Table`.

    The kind follows from the file name; `kind="tsv"` overrides it. Text is UTF-8, with or without a byte order mark.

    - jsonl: one object per line; blank lines are skipped.
    - json: a list of objects; or an object that holds exactly one list (`{"data": [...]}`); or an object whose values
      are all objects (`{"0": {...}, "1": {...}}`), then the keys become the column `id` unless the objects have one.
    - csv: RFC 4180 quoting, fields may span lines. tsv: split on TAB, quotes are literal characters.
      `header=False`: the first line is a row too, and the columns are called `c1`, `c2`, ...
    - txt: one column `text`. A form feed anywhere: one row per form-feed separated document. Otherwise, a blank line
      between two non-blank lines: one row per blank-line separated paragraph. Otherwise one row per non-blank line.
      Spaces at the ends of lines are kept.

    Raises `UserError` naming the file and the line, byte or row of what is wrong.
    """
    path = Path(path)
    compressed = path.suffix.lower() == ".gz"
    kind = _kind(path, kind)
    raw = _raw(path)
    content = _decompress(raw, path) if compressed else raw
    if not content.strip():
        raise UserError(f"{path}: the file is empty", fix="give a file with at least one row")
    found = _Rows(path)
    if kind == "parquet":
        _read_parquet(content, found)
    else:
        text = _decode(content, path)
        readers: dict[str, Callable[[str, _Rows], None]] = {
            "jsonl": _read_jsonl,
            "json": _read_json,
            "txt": _read_txt,
            "csv": lambda text, found: _read_csv(text, found, header),
            "tsv": lambda text, found: _read_tsv(text, found, header),
        }
        readers[kind](text, found)
    if found.problems:
        raise UserError(f"{path}: " + "\n  ".join(_some(found.problems)), fix=found.fix)
    if not found.rows:
        raise UserError(f"{path}: the file has no rows", fix="give a file with at least one row")
    columns = found.columns if found.columns is not None else list(dict.fromkeys(k for row in found.rows for k in row))
    digest = hashlib.sha256(raw).hexdigest()
    return Table(found.rows, path, kind, digest, tuple(columns), tuple(found.lines))


def _kind(path: Path, kind: str | None) -> str:
    kinds = list(dict.fromkeys(KINDS.values()))
    if kind is not None:
        if kind not in kinds:
            near = nearest(kind, kinds, 1)
            fix = f"kind={near[0]!r}" if near else "pass one of these"
            raise UserError(f"unknown kind of file {kind!r}; known: {listing(kinds)}", fix=fix)
        return kind
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    if path.is_dir() or not path.exists():
        return ""
    if not suffixes or suffixes[-1] not in KINDS:
        ending = suffixes[-1] if suffixes else "no ending"
        if ending in (".yaml", ".yml"):
            raise UserError(
                f"{path}: a list of data sets, as `tune`, `verify` and `data` read it; here one data set is read",
                fix="name one of the files it lists",
            )
        raise UserError(
            f"{path}: cannot tell the kind of file from its name ({ending}); known endings: "
            f"{listing(KINDS)}, each also with .gz",
            fix=f"rename the file, or pass kind=, one of {listing(kinds)}",
        )
    return KINDS[suffixes[-1]]


def _raw(path: Path) -> bytes:
    if path.is_dir():
        inside = sorted(entry.name for entry in path.iterdir() if entry.is_file())
        raise UserError(
            f"{path} is a directory, not a data file" + (f"; it holds {listing(inside)}" if inside else ""),
            fix="name one file" + (f", e.g. {path / inside[0]}" if inside else ""),
        )
    if not path.exists():
        folder = path.parent
        if not folder.is_dir():
            raise UserError(f"{path}: no such file, and no folder {folder}", fix="check the path")
        names = sorted(entry.name for entry in folder.iterdir())
        near = nearest(path.name, names)
        raise UserError(
            f"{path}: no such file; {folder} holds {listing(names) or 'nothing'}",
            fix=f"nearest: {listing(near)}" if near else "check the path",
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror or error}", fix="check the file's permissions"
        ) from error


def _decompress(raw: bytes, path: Path) -> bytes:
    if not raw:
        return b""
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file: {error}", fix="compress it again, or drop the .gz") from error


def _decode(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        offset = error.start + (3 if content.startswith(b"\xef\xbb\xbf") else 0)
        wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")
        line = content.count(b"\n", 0, offset) + 1
        raise UserError(
            f"{path}: not UTF-8 text: byte 0x{content[offset]:02x} at byte offset {offset} (line {line}): "
            + error.reason
            + ("; the file starts with a UTF-16 mark" if wide else ""),
            fix="save the file as UTF-8" + ("" if wide else ", e.g. iconv -f latin1 -t utf-8"),
        ) from error


def _some(problems: list[str], limit: int = 10) -> list[str]:
    left = len(problems) - limit
    return problems[:limit] + ([f"(+{left} more)"] if left > 0 else [])


def _broken(error: Exception) -> str:
    """What a json error says, without its own line count."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _name(value: object) -> str:
    """The JSON word for a value's type."""
    if value is None:
        return "null"
    return {bool: "a boolean", str: "a string", list: "a list", dict: "an object"}.get(type(value), "a number")


def _read_jsonl(text: str, found: _Rows) -> None:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            found.problems.append(f"line {number}: broken JSON: {_broken(error)}: {_excerpt(line)}")
            found.fix = "mend the line; every line must be one JSON object"
            continue
        if isinstance(value, dict):
            found.add(value, number)
        else:
            found.problems.append(f"line {number}: {_name(value)}, not an object")
            found.fix = found.fix or "every line must be one JSON object"
    if found.problems and text.lstrip()[:1] in ("[", "{"):
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            return
        found.problems = ["one JSON value spread over several lines, not one object per line"]
        found.fix = 'the whole file is one JSON value: name it .json, or pass kind="json"'


def _excerpt(line: str, width: int = 60) -> str:
    line = line.strip()
    return line if len(line) <= width else line[:width] + "..."


def _read_json(text: str, found: _Rows) -> None:
    pairs: list[tuple[Any, int | None]]
    try:
        if text.lstrip().startswith("["):
            pairs = [*_elements(text)]
        else:
            pairs = [(value, None) for value in _unwrapped(json.loads(text), found)]
    except (ValueError, RecursionError) as error:
        where = f"line {error.lineno}: " if isinstance(error, json.JSONDecodeError) else ""
        found.problems.append(f"{where}broken JSON: {_broken(error)}")
        found.fix = "mend the file"
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and error.lineno > 1:
            found.fix = 'the file looks like one object per line: name it .jsonl, or pass kind="jsonl"'
        return
    for number, (value, line) in enumerate(pairs, start=1):
        if isinstance(value, dict):
            found.add(value, line)
        else:
            where = f"row {number}" + (f" (line {line})" if line else "")
            found.problems.append(f"{where}: {_name(value)}, not an object")
            found.fix = "every element of the list must be an object"


def _elements(text: str) -> list[tuple[Any, int]]:
    """The elements of a top-level JSON list, each with the line it starts on."""
    scan = json.JSONDecoder().raw_decode
    space = re.compile(r"[ \t\r\n]*")

    def skip(position: int) -> int:
        match = space.match(text, position)
        return match.end() if match else position

    elements: list[tuple[Any, int]] = []
    position, line, counted = skip(skip(0) + 1), 1, 0
    if text[position : position + 1] != "]":
        while True:
            line, counted = line + text.count("\n", counted, position), position
            value, position = scan(text, position)
            elements.append((value, line))
            position = skip(position)
            mark = text[position : position + 1]
            if mark == "]":
                break
            if mark != ",":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
            position = skip(position + 1)
    position = skip(position + 1)
    if position != len(text):
        raise json.JSONDecodeError("Extra data", text, position)
    return elements


def _unwrapped(value: Any, found: _Rows) -> list[Any]:
    """The rows inside a top-level object: its only list, or its values when all are objects."""
    if not isinstance(value, dict):
        found.problems.append(f"the file holds {_name(value)}, not a list of objects")
        return []
    lists = [key for key, inside in value.items() if isinstance(inside, list)]
    if len(lists) == 1:
        rows: list[Any] = value[lists[0]]
        return rows
    if value and all(isinstance(inside, dict) for inside in value.values()):
        named = any("id" in inside for inside in value.values())
        return [inside if named else {"id": key, **inside} for key, inside in value.items()]
    what = f"{len(lists)} lists ({listing(lists)})" if lists else f"no list (keys: {listing(value) or 'none'})"
    found.problems.append(f"the file holds an object with {what}; one list of objects is needed")
    found.fix = "save the wanted list as its own file" if lists else "write a list of objects: [{...}, {...}]"
    return []


def _header(fields: list[str], found: _Rows, header: bool) -> list[str]:
    """The column names: those of the first line, or `c1`, `c2`, ... when there is no header."""
    if not header:
        return [f"c{number}" for number in range(1, len(fields) + 1)]
    names = [field.strip() for field in fields]
    blank = [str(number) for number, name in enumerate(names, start=1) if not name]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if blank:
        line = _excerpt(", ".join(names))
        found.problems.append(f"the header has no name for column {listing(blank)} of {len(names)}: {line}")
    if twice:
        found.problems.append(f"the header names a column twice: {listing(twice)}")
    if blank or twice:
        found.fix = "give every column its own name; if the first line is data already, read with header=False"
    return names


def _add_fields(records: list[tuple[int, list[str]]], found: _Rows, header: bool) -> None:
    """Check that every record is as wide as the first, and add them as rows."""
    if not records:
        return
    names = _header(records[0][1], found, header)
    if found.problems:
        return
    for line, fields in records[1:] if header else records:
        if len(fields) != len(names):
            found.problems.append(f"line {line}: {len(fields)} fields where the first line has {len(names)}")
            found.fix = "mend the lines"
        else:
            found.add(dict(zip(names, fields, strict=True)), line)
    found.columns = names


def _read_csv(text: str, found: _Rows, header: bool) -> None:
    before = csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    records: list[tuple[int, list[str]]] = []
    line = 1
    try:
        for fields in reader:
            if fields:
                records.append((line, fields))
            line = reader.line_num + 1
    except csv.Error as error:
        found.problems.append(f"line {line}: broken csv: {error}")
        found.fix = 'close the quotes and double those inside a quoted field (""); for tabs without quotes name it .tsv'
        return
    finally:
        csv.field_size_limit(before)
    _add_fields(records, found, header)
    if found.problems and found.fix == "mend the lines":
        found.fix = "put quotes around fields that hold a comma"


def _read_tsv(text: str, found: _Rows, header: bool) -> None:
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    records = [(number, line.split("\t")) for number, line in enumerate(lines, start=1) if line.strip()]
    _add_fields(records, found, header)
    if found.problems and found.fix == "mend the lines":
        found.fix = "a field must not hold a tab or a line break"


def _read_txt(text: str, found: _Rows) -> None:
    text = text.replace("\r\n", "\n")
    if "\f" in text:
        line = 1
        for document in text.split("\f"):
            body = document.lstrip("\n")
            if body.strip():
                found.add({"text": body.rstrip("\n")}, line + len(document) - len(body))
            line += document.count("\n")
    else:
        lines = text.split("\n")
        filled = [number for number, content in enumerate(lines) if content.strip()]
        paragraphs = filled[-1] - filled[0] + 1 > len(filled)
        groups: list[list[int]] = []
        for number in filled:
            if paragraphs and groups and groups[-1][-1] == number - 1:
                groups[-1].append(number)
            else:
                groups.append([number])
        for group in groups:
            found.add({"text": "\n".join(lines[number] for number in group)}, group[0] + 1)
    found.columns = ["text"]


def _read_parquet(content: bytes, found: _Rows) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.read_table(io.BytesIO(content))
    except (arrow.ArrowInvalid, arrow.ArrowNotImplementedError, OSError) as error:
        found.problems.append(f"not a readable parquet file: {str(error).splitlines()[0]}")
        found.fix = "write the file again, or check its name"
        return
    names = list(table.column_names)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        found.problems.append(f"the file names a column twice: {listing(twice)}")
        found.fix = "give every column its own name"
        return
    found.rows = table.to_pylist()
    found.columns = names
