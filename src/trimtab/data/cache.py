"""Encoded rows kept on disk, so that a large file is tokenised once.

A set lies in one safetensors file, named by the sha256 of everything its ids depend on: the rows, the chat template,
the vocabulary and rules of the tokenizer, the settings, and the versions of the packages that do the work. Anything
else is a miss. What is read is checked against the sum it was written with; a damaged file is removed and made again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.data.encode import encode_all
from trimtab.data.encoded import Encoded, EncodedSet, Report
from trimtab.data.examples import Example, Labelled
from trimtab.data.wording import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LAYOUT = 1
"""Counts up whenever `encode_all` makes other ids, masks or reports of the same rows."""
WORTH = 4096
"""Rows from which on reading is quicker than making them again."""
LIMIT_BYTES = 2 * 10**9
"""What the directory may hold in all; the files that were read longest ago go first."""
RULES = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "model")
PARTS = ("ids", "types", "source")
"""The lists of whole numbers of a sequence; the last two may be missing."""
Arrays = dict[str, Any]


def encode_cached(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    settings: Mapping[str, Any],
    folder: str | Path | None,
) -> EncodedSet:
    """`encode_all(examples, tokenizer, **settings)`, taken from `folder` where it has them, else put there.

    Nothing is kept of fewer than `WORTH` rows, of a template that writes today's date, or where `folder` is None. A
    directory that cannot be written, or a full disk, costs no more than the saving.
    """
    if folder is None or len(examples) < WORTH or dated(tokenizer):
        return encode_all(examples, tokenizer, **settings)
    path = Path(folder) / f"{key(examples, tokenizer, settings)}.safetensors"
    found = read(path)
    if found is None:
        found = encode_all(examples, tokenizer, **settings)
        write(path, found)
    return found


def dated(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes the date, so that the ids change from day to day."""
    return "strftime_now" in str(getattr(tokenizer, "chat_template", None) or "")


def key(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]) -> str:
    """sha256 over the rows, the template, the tokenizer, the settings and the versions that make ids of them."""
    worded = not isinstance(examples[0], Labelled)
    words = {name: settings[name] for name in ("template", "separator") if name in settings}
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    about = {
        "layout": LAYOUT,
        "versions": [version(name) for name in ("tokenizers", "transformers")],
        "tokenizer": fingerprint(tokenizer, **words, worded=worded),
        "rules": [backend.get(name) for name in RULES],
        "settings": {name: value for name, value in sorted(settings.items())},
    }
    digest = hashlib.sha256(json.dumps(about, default=str).encode())
    for example in examples:
        digest.update(repr(example).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def write(path: Path, found: EncodedSet) -> None:
    """Write a set so that it appears whole or not at all; then make room. A disk that refuses is left alone."""
    from safetensors.numpy import save

    arrays = arrays_of(found)
    record = {"report": dataclasses.asdict(found.report), "labels": found.labels, "sum": checksum(arrays)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(save(arrays, metadata={"record": json.dumps(record)}))
        os.replace(temporary, path)
        make_room(path.parent)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def read(path: Path) -> EncodedSet | None:
    """The set of a file, or None where there is none; a file that is not what was written is removed."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as opened:
            record = json.loads(opened.metadata()["record"])
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        if checksum(arrays) != record["sum"]:
            raise ValueError("checksum differs")
        found = set_of(arrays, record)
        os.utime(path)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        path.unlink(missing_ok=True)
        return None
    return found


def arrays_of(found: EncodedSet) -> Arrays:
    """All sequences end to end, with their lengths (-1: the list is missing)."""
    import numpy

    arrays: Arrays = {}
    for name in PARTS:
        lists = [getattr(item, name) for item in found]
        arrays[f"{name}_lengths"] = numpy.array([-1 if one is None else len(one) for one in lists], numpy.int64)
        arrays[name] = numpy.array([token for one in lists if one is not None for token in one], numpy.int64)
    arrays["trained"] = numpy.array([flag for item in found for flag in item.trained], numpy.uint8)
    arrays["rows"] = numpy.array([item.row for item in found], numpy.int64)
    if found.items and found.items[0].label is not None:
        whole = isinstance(found.items[0].label, int)
        arrays["label"] = numpy.array([item.label for item in found], numpy.int64 if whole else numpy.float64)
    return arrays


def set_of(arrays: Arrays, record: Mapping[str, Any]) -> EncodedSet:
    """The inverse of `arrays_of`."""
    columns = {name: cut(arrays[name].tolist(), arrays[f"{name}_lengths"].tolist()) for name in PARTS}
    flags = cut([bool(flag) for flag in arrays["trained"].tolist()], arrays["ids_lengths"].tolist())
    rows = arrays["rows"].tolist()
    labels = arrays["label"].tolist() if "label" in arrays else [None] * len(rows)
    items = tuple(
        Encoded(ids, trained, label, types, row, source)
        for ids, trained, label, types, row, source in zip(
            columns["ids"], flags, labels, columns["types"], rows, columns["source"], strict=True
        )
    )
    report = Report(**{**record["report"], "notes": tuple(record["report"]["notes"])})
    names = record["labels"]
    return EncodedSet(items, report, tuple(names) if isinstance(names, list) else names)


def cut(flat: list[Any], lengths: Sequence[int]) -> list[Any]:
    """A list in pieces of these lengths; None for -1."""
    ends = accumulate(max(0, length) for length in lengths)
    return [None if length < 0 else flat[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def checksum(arrays: Arrays) -> str:
    """sha256 over names, types, shapes and content."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def make_room(folder: Path) -> None:
    """Remove the files that were used longest ago until the directory is within its limit."""
    files = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
    used = 0
    for file in files:
        used += file.stat().st_size
        if used > LIMIT_BYTES and file != files[0]:
            file.unlink(missing_ok=True)
