"""What a run refuses before it starts, as one Markdown page made from the tables that the code itself asks."""

from __future__ import annotations

from pathlib import Path

INTRODUCTION = """# What is refused before training

Some choices do not work together, and some files are not read. A run says so before anything is trained or written,
with what to do instead. This page is generated from the tables that the code asks, by `trimtab.report.refusals`; a test
compares. What a single method does not keep of the laws stands with it in [methods.md](methods.md).
"""


def page() -> str:
    """The whole page."""
    from trimtab.train.updates import markdown

    parts = [INTRODUCTION, "## Choices that do not go together\n", f"{markdown()}\n"]
    parts += ["## Methods of quantizing whose files are not read\n", unread(), "## GGUF files\n", gguf()]
    return "\n".join(parts).rstrip() + "\n"


def unread() -> str:
    """The table of foreign methods, with the format of ours that is nearest."""
    from trimtab.models.coded.packed import INSTEAD, KNOWN

    text = f"The codes of {KNOWN} are taken over as they are. Of others, give the model as it was before, with"
    lines = [f"{text}\n", "| `quant_method` | a format of ours instead |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | `{instead}` |" for name, instead in INSTEAD.items())]) + "\n"


def gguf() -> str:
    """Which blocks of GGUF are kept, and as what."""
    from trimtab.models.coded.gguf_blocks import BYTES, format_of
    from trimtab.models.coded.gguf_file import ARCHITECTURES

    lines = [
        f"Codes are kept in files of the architectures {', '.join(ARCHITECTURES)}; others are refused. A\n"
        "linear layer of a type that is not in this table is decoded, and the run says how many are.\n",
        "| type | kept as |",
        "|---|---|",
    ]
    return "\n".join([*lines, *(f"| {kind} | `{format_of(kind)}` |" for kind in BYTES)]) + "\n"


def write(path: str | Path) -> Path:
    """Write the page to a file, whose directory is made if needed."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(), encoding="utf-8")
    return target
