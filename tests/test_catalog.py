"""The catalog lists what is in the folders, and the README's table is generated from it."""

from __future__ import annotations

import json
from pathlib import Path

import trimtab as tt
from trimtab.catalog import describe, markdown, presets

README = Path(__file__).resolve().parent.parent / "README.md"


def test_every_method_file_is_listed_with_its_paper_and_equation() -> None:
    folder = Path(tt.__file__).parent / "methods"
    files = [path for path in folder.rglob("*.py") if path.parent.name != "start"]
    stems = {path.stem for path in files if not path.stem.startswith("_")}
    assert set(tt.methods()) == stems
    for name in tt.methods():
        facts = describe(name)
        assert facts["equation"], name
        assert facts["space"] in ("weight", "hidden", "input"), name


def test_descriptions_are_plain_data_up_to_nested_methods() -> None:
    for name in (*tt.methods(), *presets()):
        json.dumps(describe(name), default=repr)


def test_names_are_public_attributes() -> None:
    for name, cls in tt.methods().items():
        assert getattr(tt, cls.__name__) is cls, name
    assert tt.formats()["nf4"] is tt.NF4


def test_the_readme_has_the_table_of_this_registry() -> None:
    text = README.read_text(encoding="utf-8")
    start = text.index("-->", text.index("<!-- methods:")) + 3
    shown = text[start : text.index("<!-- end of methods -->")].strip()
    assert shown == markdown(), "rewrite it: python -c 'from trimtab.catalog import markdown; print(markdown())'"
