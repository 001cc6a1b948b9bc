"""Files that appear whole or not at all, and their checksums."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from trimtab.core.errors import UserError

Content: TypeAlias = bytes | Callable[[Path], object]
"""What a file is to hold, or a function that writes it to a path."""


def write_together(directory: Path, files: Mapping[str, Content]) -> None:
    """Write several files so that all appear or none: temporary names, flushed to disk, then renamed.

    They are written in the order given, so that a function may go by what an earlier one wrote.
    """
    made = not directory.exists()
    pending: list[tuple[Path, Path]] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            temporary = directory / f".{name}.{os.getpid()}.partial"
            pending.append((temporary, directory / name))
            if isinstance(content, bytes):
                temporary.write_bytes(content)
            else:
                content(temporary)
            flush(temporary)
        for temporary, final in pending:
            os.replace(temporary, final)
    except OSError as error:
        raise UserError(
            f"save: could not write {', '.join(files)} to {directory}: {error.strerror or error}",
            fix="free some space or choose another directory; what was there before is unchanged",
        ) from None
    finally:
        for temporary, _ in pending:  # those that are still there
            temporary.unlink(missing_ok=True)
        if made and directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Have a file, or a directory's entries, on disk, where the system can."""
    if os.name == "posix" or path.is_file():
        handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
