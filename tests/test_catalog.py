"""The catalog lists what is in the folders, and the README's table is generated from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from trimtab.catalog import attachable, describe, entries, markdown, on_model

ROOT = Path(__file__).resolve().parent.parent
README, GALLERY = ROOT / "README.md", ROOT / "docs" / "methods.md"


def outline(architecture: str = "llama") -> Any:
    """A tiny model without weights."""
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    with torch.device("meta"):
        if architecture == "bert":
            return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_attention_heads=4))
        config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
        return transformers.LlamaForCausalLM(config)


def test_every_method_file_is_listed_with_its_paper_and_equation() -> None:
    folder = Path(tt.__file__).parent / "methods"
    files = [path for path in folder.rglob("*.py") if path.parent.name != "start"]
    stems = {path.stem for path in files if not path.stem.startswith("_")}
    assert set(tt.methods()) == stems
    for name in tt.methods():
        facts = describe(name)
        assert facts["equation"], name
        assert facts["space"] in ("weight", "hidden", "input"), name


APART = {
    "storage": ("summary", "equation", "cost", "bits_per_weight"),
    "optim": ("summary", "equation", "state_bytes_per_value", "rate_factor"),
    "active": ("summary", "equation", "cost"),
}


def test_everything_says_the_same_things_of_itself_as_plain_data() -> None:
    said = ("summary", "equation", "where", "cost", "mergeable", "hosts", "storages", "laws", "learning_rate")
    for name, kind in entries():
        facts = describe(name, kind)
        assert json.loads(json.dumps(facts)) == facts, name
        wanted = APART.get(kind, said)
        assert not [key for key in wanted if facts[key] in ("", None)], name
    assert describe("nf4")["bits_per_weight"] == 4.5
    assert describe("adamw")["state_bytes_per_value"] == 8
    assert describe("lomo")["in_backward"]
    assert not describe("galore")["in_backward"]
    assert describe("LoRA-GA")["kind"] == "presets"
    assert describe("pissa", "start")["presets"] == ["pissa"]
    assert describe("pissa")["start"] == "pissa"
    assert describe("loftq")["needs"] == ["quantize"]
    assert "float32" not in describe("loftq")["storages"]


def test_the_cost_is_the_sentence_of_the_docstring() -> None:
    assert describe("lora")["cost"] == (
        "Costs 2·rank·(in + out) multiplications per token, twice that with A0 and B0; nothing after merging."
    )
    assert "arXiv" not in "".join(describe(*entry)["cost"] for entry in entries())


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(tt.UserError, match="did you mean lora"):
        tt.describe("lorra")
    with pytest.raises(tt.UserError, match="nf4"):
        tt.describe("lora", "storage")


@pytest.mark.parametrize(
    "name", ["lora", "dora", "vera", "houlsbynorm", "full", "prefix_tuning", "init_b", "fish_mask"]
)
def test_counts_by_formula_are_those_of_attaching(name: str) -> None:
    model = outline()
    found = on_model(name, model, 32)
    kind = describe(name)["kind"]
    tt.attach(model, attachable(name, kind))
    assert found["parameters"] == sum(one.numel() for one in model.parameters() if one.requires_grad)
    assert found["share"] == found["parameters"] / sum(one.numel() for one in outline().parameters())


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_everything_is_counted_or_says_why_not(architecture: str) -> None:
    model = outline(architecture)
    for name, kind in entries():
        found = on_model(name, model, 32, kind)
        if kind not in ("optim", "active"):
            assert found.get("problem") or found.get("bytes") or found["parameters"] > 0, name


def test_a_method_that_does_not_go_on_a_model_says_why() -> None:
    assert "no ancestor" in on_model("prefix_tuning", outline().model.layers, 32)["problem"]


def test_a_format_is_measured_in_the_bytes_of_the_linear_weights() -> None:
    linears = [one for one in outline().model.layers.modules() if isinstance(one, torch.nn.Linear)]
    found = on_model("absmax", outline(), 32)
    assert found["weights"] == sum(one.weight.numel() for one in linears)
    assert found["bytes"] == found["weights"] + 4 * sum(one.out_features for one in linears)


def test_names_are_public_attributes() -> None:
    for name, cls in tt.methods().items():
        assert getattr(tt, cls.__name__) is cls, name
    assert tt.formats()["nf4"] is tt.NF4


def test_the_readme_has_the_table_of_this_registry() -> None:
    text = README.read_text(encoding="utf-8")
    start = text.index("-->", text.index("<!-- methods:")) + 3
    shown = text[start : text.index("<!-- end of methods -->")].strip()
    assert shown == markdown(), "rewrite it: python -c 'from trimtab.catalog import markdown; print(markdown())'"


def test_the_gallery_is_that_of_this_registry() -> None:
    from trimtab.report.gallery import gallery

    rewrite = "python -c 'from trimtab.report.gallery import write; write(\"docs/methods.md\")'"
    assert GALLERY.read_text(encoding="utf-8") == gallery(), f"rewrite it: {rewrite}"


def test_the_gallery_has_every_exception_with_its_reason() -> None:
    text = GALLERY.read_text(encoding="utf-8")
    for name, cls in tt.methods().items():
        for law, reason in cls().laws.items():
            assert f"| not {law} | {reason} |" in text.partition(f"### {name}\n")[2].partition("\n### ")[0]
