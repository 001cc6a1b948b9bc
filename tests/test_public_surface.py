"""What users rely on is written down in tests/snapshots and may not change by accident; nor may the time to start.

`make snapshots` rewrites them; the difference then shows in review and belongs in the CHANGELOG.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest

SNAPSHOTS = Path(__file__).resolve().parent / "snapshots"
COMMAND = Path(__file__).resolve().parent.parent / "src" / "trimtab" / "cli" / "main.py"

needs_command = pytest.mark.skipif(not COMMAND.exists(), reason="there is no command yet")


def compare(name: str, make: Callable[[], str], update: bool) -> None:
    path = SNAPSHOTS / name
    if update:
        path.write_text(make(), encoding="utf-8")
        return
    if not path.exists():
        pytest.skip(f"there is no {name} yet; `make snapshots` writes it")
    old, text = path.read_text(encoding="utf-8"), make()
    change = "\n".join(difflib.unified_diff(old.splitlines(), text.splitlines(), name, "now", lineterm="", n=1))
    assert old == text, f"{change}\n\nIf this is meant: make snapshots, and a line in CHANGELOG.md"


def written(value: Any) -> str:
    """An annotation or a default as text that is the same in every process."""
    if isinstance(value, str):
        return value
    if isinstance(value, type) or callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return repr(value)


def default(value: Any) -> str:
    return repr(value) if isinstance(value, str) else written(value)


def signature(function: Any) -> str:
    parts, keyword_only = [], False
    found = inspect.signature(function)
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            parts.append("*")
        keyword_only |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        text = star + parameter.name
        if parameter.annotation is not parameter.empty:
            text += f": {written(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            text += f" = {default(parameter.default)}"
        parts.append(text)
    returns = "" if found.return_annotation is found.empty else f" -> {written(found.return_annotation)}"
    return f"({', '.join(parts)}){returns}"


def described(name: str, thing: Any) -> Iterator[str]:
    """A function as one line; a class with its constructor, and a line for each public member of its own."""
    if isinstance(thing, ModuleType):
        yield f"{name}: module"
    elif isinstance(thing, type):
        bases = ", ".join(base.__name__ for base in thing.__bases__ if base is not object)
        constructor = "" if inspect.isabstract(thing) else signature(thing)
        yield f"class {name}[{bases}]{constructor}" if bases else f"class {name}{constructor}"
        for member, value in sorted(vars(thing).items()):
            if member.startswith("_"):
                continue
            if isinstance(value, property):
                yield f"    {member}: property"
            elif isinstance(value, staticmethod | classmethod):
                yield f"    {type(value).__name__} {member}{signature(value.__func__)}"
            elif inspect.isfunction(value):
                yield f"    {member}{signature(value)}"
    elif callable(thing):
        yield f"{name}{signature(thing)}"
    else:
        yield f"{name}: {type(thing).__name__}"


def public_surface() -> str:
    """Everything `trimtab` exports by name, then its methods, its storage formats and its presets."""
    trimtab = importlib.import_module("trimtab")
    importlib.import_module("trimtab.methods")  # from here on the callable package stands under its name
    registry = importlib.import_module("trimtab.core.registry")
    presets = importlib.import_module("trimtab.presets")
    sections = {
        "trimtab": {name: getattr(trimtab, name) for name in sorted(trimtab.__all__)},
        "methods": {name: registry.find(name, "methods") for name in sorted(registry.names("methods"))},
        "storage formats": {name: registry.find(name, "storage") for name in sorted(registry.names("storage"))},
        "presets": {
            name: value
            for name, value in sorted(vars(presets).items())
            if inspect.isfunction(value) and value.__module__ == presets.__name__ and not name.startswith("_")
        },
    }
    lines: list[str] = []
    for title, things in sections.items():
        lines += [f"# {title}", ""]
        for name, thing in things.items():
            lines += described(name, thing)
        lines.append("")
    return "\n".join(lines)


def commands(command: click.Command, path: str, context: click.Context | None = None) -> Iterator[str]:
    """Every command below `command` with its arguments and options, one line each."""
    here = click.Context(command, info_name=path.split()[-1], parent=context)
    yield f"{path}: {command.get_short_help_str(200)}"
    for parameter in command.get_params(here):
        if "--help" in parameter.opts:
            continue
        about = parameter.to_info_dict()
        names = ", ".join([*parameter.opts, *parameter.secondary_opts])
        kind = "flag" if about.get("is_flag") else parameter.make_metavar(here)
        marks = [mark for mark in ("required", "multiple", "hidden") if about.get(mark)]
        if about.get("default") not in (None, False, ()):
            marks.append(f"default {about['default']!r}")
        extra = f" ({', '.join(marks)})" if marks else ""
        yield f"    {names} {kind}{extra}: {about.get('help') or ''}".rstrip(": ")
    yield ""
    if isinstance(command, click.Group):
        for name in command.list_commands(here):
            below = command.get_command(here, name)
            assert below is not None, f"{path} lists {name!r} but has no such command"
            yield from commands(below, f"{path} {name}", here)


def command_line() -> str:
    # A command that ran in this process has taken on the flags of its method, so these are fresh modules.
    used = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("trimtab.cli")}
    try:
        return "\n".join(commands(importlib.import_module("trimtab.cli.main").cli, "trimtab"))
    finally:
        for name in [name for name in sys.modules if name.startswith("trimtab.cli")]:
            del sys.modules[name]
        sys.modules.update(used)
        if "trimtab.cli" in used:
            sys.modules["trimtab"].cli = used["trimtab.cli"]


@pytest.mark.parametrize(("name", "make"), [("public_api.txt", public_surface), ("command_line.txt", command_line)])
def test_snapshot(name: str, make: Callable[[], str], pytestconfig: pytest.Config) -> None:
    compare(name, make, pytestconfig.getoption("--update-snapshots"))


def test_a_signature_is_written_the_same_way_every_time() -> None:
    class Example:
        def method(self, a: int, *rest: str, mode: str = "x", make: Any = dict) -> None: ...

        @property
        def size(self) -> int:
            return 0

    assert list(described("Example", Example)) == [
        "class Example()",
        "    method(self, a: int, *rest: str, mode: str = 'x', make: Any = dict) -> None",
        "    size: property",
    ]


def test_the_command_tree_is_walked() -> None:
    @click.group()
    def cli() -> None:
        """A tool."""

    @cli.command()
    @click.argument("model")
    @click.option("--rank", type=int, default=8, help="Directions.")
    @click.option("--json", is_flag=True)
    @click.option("--kind", type=click.Choice(["a", "b"]), required=True)
    def tune(model: str, rank: int, json: bool, kind: str) -> None:
        """Tunes."""

    assert list(commands(cli, "tool")) == [
        "tool: A tool.",
        "",
        "tool tune: Tunes.",
        "    model MODEL (required)",
        "    --rank INTEGER (default 8): Directions.",
        "    --json flag",
        "    --kind [a|b] (required)",
        "",
    ]


def child(code: str, environment: dict[str, str]) -> str:
    """The last line a fresh interpreter prints to its standard error."""
    done = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stderr.strip().splitlines()[-1]


def stays_under(seconds: float, code: str, environment: dict[str, str], runs: int = 5) -> bool:
    """Whether one of several runs prints less: in processor time, so that a busy machine hardly counts."""
    return any(float(child(code, environment)) < seconds for _ in range(runs))


def test_importing_trimtab_imports_neither_torch_nor_transformers(source_environment: dict[str, str]) -> None:
    code = "import sys, trimtab; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    assert child(code, source_environment) == "[]"


@pytest.mark.slow
def test_importing_trimtab_takes_less_than_a_third_of_a_second(source_environment: dict[str, str]) -> None:
    """Beyond torch, and with the first use of a function and of a method."""
    code = (
        "import sys, time, torch; start = time.process_time(); import trimtab; trimtab.attach; trimtab.LoRA; "
        "print(time.process_time() - start, file=sys.stderr)"
    )
    assert stays_under(0.3, code, source_environment)


HELP = """
import atexit, sys, time
sys.argv = ["trimtab", "--help"]
atexit.register(lambda: print({shown}, file=sys.stderr))
from trimtab.cli.main import main
main()
"""


@needs_command
def test_help_does_not_import_torch(source_environment: dict[str, str]) -> None:
    code = HELP.format(shown="sorted({'torch', 'transformers', 'numpy', 'matplotlib', 'pyarrow'} & set(sys.modules))")
    assert child(code, source_environment) == "[]"


@needs_command
def test_help_appears_in_less_than_half_a_second(source_environment: dict[str, str]) -> None:
    assert stays_under(0.5, HELP.format(shown="time.process_time()"), source_environment)
