"""The rules that keep the folders apart, read from the source itself: no module is imported here.

import-linter (see pyproject.toml) checks who may import whom between packages; this file checks what it cannot say.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "trimtab"
AXES = ("core", "methods", "optim", "storage")

# Packages an axis may import besides torch and the standard library, each with its reason.
ALSO_ALLOWED = {
    "core": {"safetensors"},  # the file format of saved deltas
}
# Slow to import, so imported inside the function that needs them.
HEAVY = {"accelerate", "bitsandbytes", "gguf", "matplotlib", "peft", "pyarrow", "transformers"}
# They run code found in a file.
UNSAFE = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
CODE_SWITCHES = {"allow_pickle", "trust_remote_code"}
SAYS_NOTHING = {"common", "helpers", "misc", "util", "utils"}
LONGEST_METHOD = 150


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def files(folder: str = "") -> list[Path]:
    return sorted((SOURCE / folder).rglob("*.py"))


def registered(folder: str) -> list[Path]:
    """Files that are entries of a registry: neither private nor `__init__.py`."""
    return [path for path in files(folder) if not path.name.startswith("_")]


def module_of(path: Path) -> str:
    parts = ("trimtab", *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, nodes: Iterator[ast.AST] | None = None) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, `from a import b` as `a.b`, relative ones made absolute."""
    package = module_of(path).split(".") if path.name == "__init__.py" else module_of(path).split(".")[:-1]
    for node in ast.walk(tree(path)) if nodes is None else nodes:
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*above, *([node.module] if node.module else [])])
            for name in node.names:
                yield node.lineno, f"{start}.{name.name}"


def at_import_time(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes under `node` that run when its module is imported: not function bodies, not `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from at_import_time(child)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Public functions of a module and public methods of its classes; not what is nested in them."""
    for node in tree(path).body:
        for inner in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and not inner.name.startswith("_"):
                yield inner


def at(path: Path, line: int, what: str) -> str:
    return f"{path.relative_to(ROOT)}:{line}: {what}"


def none(found: list[str]) -> None:
    assert not found, "\n  " + "\n  ".join(found)


def test_the_source_is_where_these_tests_look() -> None:
    assert {module_of(path) for path in files()} >= {"trimtab", "trimtab.core.errors", "trimtab.methods"}


@pytest.mark.parametrize("axis", AXES)
def test_an_axis_imports_only_torch_and_the_standard_library(axis: str) -> None:
    allowed = {"torch", "trimtab", *sys.stdlib_module_names, *ALSO_ALLOWED.get(axis, ())}
    found = []
    for path in files(axis):
        # A view of a foreign storage format imports its backend in the file of that name, and nowhere else.
        own = {path.stem} if axis == "storage" else set()
        for line, module in imported(path):
            if module.split(".")[0] not in allowed | own:
                found.append(at(path, line, f"imports {module}"))
    none(found)


def test_methods_never_import_each_other() -> None:
    found = []
    for path in files("methods"):
        for line, module in imported(path):
            if module.startswith("trimtab.methods"):
                found.append(at(path, line, f"imports {module}"))
    none(found)


def test_no_file_imports_itself_by_way_of_others() -> None:
    known = {module_of(path): path for path in files()}

    def file_of(name: str) -> str | None:
        """The file an imported name is from: a module, or what a module defines."""
        return next((part for part in (name, name.rpartition(".")[0]) if part in known), None)

    below = {name: {file_of(found) for _, found in imported(path)} - {None, name} for name, path in known.items()}
    left = dict(below)
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    inside = {name: needs & left.keys() for name, needs in left.items()}
    while outer := [name for name in inside if not any(name in needs for needs in inside.values())]:
        for name in outer:
            del inside[name]
    none([f"{name} -> {other}" for name, needs in sorted(inside.items()) for other in sorted(needs & inside.keys())])


def test_the_map_of_core_is_right() -> None:
    text = re.sub(r"\(.*?\)", "", ast.get_docstring(tree(SOURCE / "core" / "__init__.py")) or "")
    groups = [re.findall(r"\w+", part)[1:] for part in re.split(r"\n(?=\w)", text)[1:]]
    group = {name: at for at, names in enumerate(groups) for name in names}
    assert sorted(group) == sorted(path.stem for path in files("core") if path.stem != "__init__")
    found = []
    for path in files("core"):
        for line, module in imported(path):
            other = (module.split(".") + [""] * 3)[2]
            if module.startswith("trimtab.core.") and group.get(other, 0) > group.get(path.stem, 99):
                found.append(at(path, line, f"imports {other}, which the map has further down"))
    none(found)


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    found = []
    for path in files():
        for line, module in imported(path, at_import_time(tree(path))):
            if module.split(".")[0] in HEAVY:
                found.append(at(path, line, f"imports {module} at import time; move it into the function"))
    none(found)


def test_importing_trimtab_or_its_command_does_not_import_torch() -> None:
    found = []
    for path in [SOURCE / "__init__.py", *files("cli")]:
        for line, module in imported(path, at_import_time(tree(path))):
            if module.split(".")[0] == "torch":
                found.append(at(path, line, "imports torch at import time"))
    none(found)


def test_nothing_unpickles() -> None:
    found = []
    for path in files():
        # A law proves that a delta survives a pickle round trip; it reads no file.
        if not path.is_relative_to(SOURCE / "laws"):
            for line, module in imported(path):
                if module.split(".")[0] in UNSAFE:
                    found.append(at(path, line, f"imports {module}"))
        for line, module in imported(path):
            if module in ("torch.save", "torch.load"):
                found.append(at(path, line, f"imports {module}; use safetensors"))
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.save", "torch.load"):
                found.append(at(path, node.lineno, f"{ast.unparse(node)}; use safetensors"))
            if isinstance(node, ast.keyword) and node.arg in CODE_SWITCHES and ast.unparse(node.value) != "False":
                found.append(at(path, node.value.lineno, f"{node.arg} is not False"))
    none(found)


def test_methods_do_not_ask_a_layer_for_its_class() -> None:
    found = []
    for path in files("methods"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
                found.append(at(path, node.lineno, f"{ast.unparse(node)}; Base and Site hide what the layer is"))
    none(found)


def test_public_functions_name_their_arguments() -> None:
    found = []
    for path in files():
        # Outside of methods, `forward` is torch's verb: a module that stands in for another passes on what it gets.
        # `segment_attention` and `shifted_attention` are called by transformers, which hands an attention function
        # whatever a model was given.
        torch_calls = {"forward", "segment_attention", "shifted_attention"}
        passes_on = set() if path.is_relative_to(SOURCE / "methods") else torch_calls
        for function in functions(path):
            if function.args.kwarg is not None and function.name not in passes_on:
                found.append(at(path, function.lineno, f"{function.name}(**{function.args.kwarg.arg})"))
    none(found)


def test_a_method_file_is_short() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files("methods")}
    none(
        [
            at(path, count, f"{count} lines, {LONGEST_METHOD} at most")
            for path, count in lines.items()
            if count > LONGEST_METHOD
        ]
    )


@pytest.mark.parametrize("folder", ["methods", "storage"])
def test_a_file_holds_the_one_class_it_is_named_after(folder: str) -> None:
    found = []
    for path in registered(folder):
        classes = [node.name for node in tree(path).body if isinstance(node, ast.ClassDef)]
        public = [name for name in classes if not name.startswith("_")]
        if [name.lower() for name in public] != [path.stem.replace("_", "")]:
            found.append(at(path, 1, f"public classes {public}"))
    none(found)


def test_a_family_file_holds_the_family_it_is_named_after() -> None:
    found = []
    for path in registered("families"):
        names = [
            keyword.value.value
            for node in tree(path).body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FAMILY"
            if isinstance(node.value, ast.Call)
            for keyword in node.value.keywords
            if keyword.arg == "name" and isinstance(keyword.value, ast.Constant)
        ]
        if names != [path.stem]:
            found.append(at(path, 1, f"FAMILY names {names}"))
    none(found)


def test_every_file_name_says_something() -> None:
    folders = [path for path in SOURCE.rglob("*") if path.is_dir() and path.name != "__pycache__"]
    none([at(path, 1, f"{path.stem!r} says nothing") for path in [*files(), *folders] if path.stem in SAYS_NOTHING])


WRONG = {
    test_an_axis_imports_only_torch_and_the_standard_library: "def f():\n    import numpy\n",
    test_methods_never_import_each_other: "from .lora import LoRA\n",
    test_heavy_packages_are_imported_where_they_are_used: "if True:\n    import transformers\n",
    test_nothing_unpickles: "import torch\ntorch.load('x')\n",
    test_methods_do_not_ask_a_layer_for_its_class: "def f(x):\n    return isinstance(x, int)\n",
    test_public_functions_name_their_arguments: "class A:\n    def f(self, **kwargs): ...\n",
    test_a_method_file_is_short: "\n" * (LONGEST_METHOD + 1),
    test_a_file_holds_the_one_class_it_is_named_after: "class Other: ...\n",
}


@pytest.mark.parametrize(("rule", "text"), WRONG.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_each_rule_can_fail(
    rule: Callable[..., None], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rules pass on an empty tree and object to one method file that breaks them."""
    (tmp_path / "methods" / "weight").mkdir(parents=True)
    monkeypatch.setitem(globals(), "SOURCE", tmp_path)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    argument = {
        test_an_axis_imports_only_torch_and_the_standard_library: ["methods"],
        test_a_file_holds_the_one_class_it_is_named_after: ["methods"],
    }.get(rule, [])
    rule(*argument)
    (tmp_path / "methods" / "weight" / "wrong.py").write_text(text, encoding="utf-8")
    with pytest.raises(AssertionError, match=r"wrong\.py"):
        rule(*argument)


def test_one_process_imports_nothing_for_several() -> None:
    """What spreads a model over processes is imported when it is asked for, and nothing else of torch's package is."""
    own = {"trimtab.engine.shards"}
    found = []
    for path in files():
        for line, module in imported(path, at_import_time(tree(path))):
            distributed = module.startswith("torch.distributed") and module_of(path) not in own
            if distributed or any(module.startswith(one) for one in own):
                found.append(at(path, line, f"imports {module}"))
    none(found)
