"""Plain LoRAs of any change of weights, what can serve them, and GGUF read back with the package of its authors."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.families.tiny_models import build
from tests.interop.conftest import VOCABULARY, logits, make
from torch import nn

import trimtab as tt
from trimtab.core.errors import UserError
from trimtab.core.save import attach_saved
from trimtab.interop.gguf_lora import read_gguf_lora, write_gguf_lora
from trimtab.interop.gguf_model import write_gguf_model
from trimtab.interop.peft.writing import to_peft
from trimtab.interop.saved import saved_of
from trimtab.interop.servable import verdicts
from trimtab.interop.to_lora import to_lora
from trimtab.models.gguf import read_weights

WEIGHT_METHODS: dict[str, Any] = {
    "lora": tt.LoRA(rank=3),
    "dora": tt.DoRA(rank=3),
    "pissa": tt.LoRA(rank=3, start=tt.PiSSA()),
    "loha": tt.LoHa(rank=2),
    "lokr": tt.LoKr(rank=2),
    "ia3": tt.IA3(),
    "oft": tt.OFT(block_size=4),
    "vera": tt.VeRA(rank=4),
    "hira": tt.HiRA(rank=2),
    "shira": tt.SHiRA(rank=2),
    "full": tt.Full(),
}


def tuned(shape: str, method: Any, where: str | None) -> Any:
    model = make(shape)
    tt.attach(model, method, where)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn_like(value))
    return model


@pytest.mark.parametrize("shape", ["llama", "gpt2", "neox"])
@pytest.mark.parametrize("name", WEIGHT_METHODS)
def test_with_the_full_rank_a_lora_is_exact(name: str, shape: str) -> None:
    model = tuned(shape, WEIGHT_METHODS[name], "v, o, down")
    saved, fits = to_lora(model, energy=1.0)
    assert all(fit.error < 1e-4 for fit in fits)
    twin = make(shape)
    attach_saved(twin, saved.record, saved.tensors, "test")
    assert (logits(twin) - logits(model)).abs().max() < 2e-4
    ranks = {part.method.rank for part in saved.parts if hasattr(part.method, "rank")}
    assert len(ranks) == 1
    assert {type(part.method).__name__ for part in saved.parts} <= {"LoRA", "OutputBias"}


def test_a_cut_is_the_best_one_and_its_error_is_told() -> None:
    model = tuned("llama", tt.Full(), "q")
    wide = make("llama")
    saved, fits = to_lora(model, rank=3)
    for fit, path in zip(fits, ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"), strict=True):
        V = saved_of(model).tensors[f"full.{path}.V"].double()
        change = V - wide.get_submodule(path).weight.detach().double()
        values = torch.linalg.svdvals(change)
        assert fit.kept == 3
        assert fit.error == pytest.approx(float((values[3:].square().sum() / values.square().sum()).sqrt()), rel=1e-4)
        B, A = (saved.tensors[f"lora.{path}.{key}"].double() for key in "BA")
        left = torch.linalg.matrix_norm(change - B @ A)
        assert float(left) == pytest.approx(fit.error * float(torch.linalg.matrix_norm(change)), rel=1e-4)


def test_a_share_of_energy_is_kept() -> None:
    _, fits = to_lora(tuned("llama", tt.Full(), "q"), energy=0.5)
    assert all(0.5 < fit.error < 0.75**0.5 and fit.kept < fit.rank for fit in fits)
    _, fits = to_lora(tuned("llama", tt.LoHa(rank=2), "q"))
    assert [(fit.kept, fit.rank, fit.error) for fit in fits] == [(4, 4, 0.0)] * 2


def test_norms_stay_copies_and_what_changes_no_weight_is_refused() -> None:
    model = make("llama")
    tt.attach(model, [tt.LoKr(rank=2).at("q"), tt.LNTuning().at("norm")])
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn_like(value))
    saved, _ = to_lora(model)
    twin = make("llama")
    attach_saved(twin, saved.record, saved.tensors, "test")
    assert (logits(twin) - logits(model)).abs().max() < 1e-4
    with pytest.raises(UserError, match="GELU between D and U"):
        to_lora(tuned("llama", tt.Houlsby(bottleneck=2), "ffn"))
    untouched = make("llama")
    tt.attach(untouched, tt.LoKr(rank=2), "q")
    with pytest.raises(UserError, match="changes nothing"):
        to_lora(untouched)


def accepted(method: Any, where: str | None, shape: str = "llama") -> dict[str, bool]:
    model = tuned(shape, method, where)
    config, tensors = to_peft(make(shape), saved_of(model))
    return {one.program: one.accepts for one in verdicts(config, tensors)}


@pytest.mark.parametrize(
    ("method", "where", "wanted"),
    [
        (tt.LoRA(rank=2), "q", {"vLLM": True, "llama.cpp": True, "Ollama": True, "PEFT": True}),
        (tt.DoRA(rank=2), "q", {"vLLM": False, "llama.cpp": False, "Ollama": False, "PEFT": True}),
        (tt.LoKr(rank=2), "q", {"vLLM": False, "llama.cpp": False, "Ollama": False, "PEFT": True}),
        (tt.LoRA(rank=2, ranks="q=3"), "q, v", {"vLLM": False, "llama.cpp": True, "Ollama": True, "PEFT": True}),
        ([tt.LoRA(rank=2).at("q"), tt.Full().at("head")], None, dict.fromkeys(("vLLM", "llama.cpp", "Ollama"), False)),
    ],
)
def test_who_can_serve_it(method: Any, where: str | None, wanted: dict[str, bool]) -> None:
    found = accepted(method, where)
    assert {name: found[name] for name in wanted} == wanted


def test_a_converted_adapter_is_servable_by_all() -> None:
    saved, _ = to_lora(tuned("llama", tt.LoKr(rank=2), "q, down"))
    assert all(one.accepts for one in verdicts(*to_peft(make("llama"), saved)))


@pytest.mark.parametrize("shape", ["llama", "gpt2", "neox"])
def test_a_gguf_lora_makes_the_same_changes(shape: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    where = "q, v, down, embed" if shape == "llama" else "q, v, down"
    model = tuned(shape, tt.LoRA(rank=3, ranks="down=2"), where)
    path = tmp_path / "lora.gguf"
    names = write_gguf_lora(make(shape), saved_of(model), path)
    reader = gguf.GGUFReader(str(path))
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    arch = "gptneox" if shape == "neox" else shape
    assert reader.fields["general.architecture"].contents() == arch
    assert sorted(one.name for one in reader.tensors) == names
    found = read_gguf_lora(path, model.config)
    base = make(shape)
    spelled = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), 2)
    tt.merge(model)
    changed = 0
    for name, module in base.named_modules():
        weight, key = getattr(module, "weight", None), spelled.get_name(f"{name}.weight", try_suffixes=(".weight",))
        if weight is None or key not in found:
            continue
        change = model.get_submodule(name).weight - weight
        change = change.mT if hasattr(module, "nf") or "embed" in name or name.endswith("wte") else change
        assert torch.allclose(found[key], change, atol=1e-6), name
        changed += 1
    assert changed == len(found) == len(names) // 2
    assert {path.name for path in tmp_path.iterdir()} == {"lora.gguf"}


PAIRED = ("smollm3", "arcee", "olmo")
"""Beside Llama: model types whose converter takes over how it orders the rows of q and k."""


def in_pairs(change: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows as llama.cpp's converter orders those of q and k for Llama: the two halves of every head in turn."""
    return change.reshape(heads, 2, -1, change.shape[1]).swapaxes(1, 2).reshape(change.shape)


def in_parts(change: torch.Tensor, heads: int, keys: int) -> torch.Tensor:
    """Rows as it orders those of one weight for Falcon (and, with as many keys as queries, BLOOM and GPT-NeoX)."""
    size = change.shape[0] // (heads + 2 * keys)
    groups = change.view(keys, heads // keys + 2, size, change.shape[1])
    return torch.cat([one.reshape(-1, change.shape[1]) for one in (groups[:, :-2], groups[:, [-2]], groups[:, [-1]])])


@pytest.mark.parametrize(
    ("model_type", "changes", "order"),
    [
        *((one, {}, lambda name, change: in_pairs(change, 4 if "q_proj" in name else 2)) for one in PAIRED),
        ("qwen3", {}, lambda name, change: change),
        ("gpt_neox", {}, lambda name, change: in_parts(change, 4, 4)),
        ("bloom", {}, lambda name, change: in_parts(change, 4, 4)),
        ("falcon", {"multi_query": False}, lambda name, change: in_parts(change, 4, 4)),
        ("falcon", {"multi_query": True}, lambda name, change: in_parts(change, 4, 1)),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, lambda name, change: in_parts(change, 4, 2)),
    ],
)
def test_a_gguf_lora_has_its_rows_in_the_order_of_the_architecture(
    model_type: str, changes: dict[str, Any], order: Any, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    frozen = build(model_type, "AutoModelForCausalLM", **changes)
    model = copy.deepcopy(frozen)
    tt.attach(model, tt.LoRA(rank=2), "q, k")
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn_like(value))
    path = tmp_path / "lora.gguf"
    write_gguf_lora(frozen, saved_of(model), path)
    tt.merge(model)
    held = {one.name: torch.from_numpy(one.data.copy()) for one in gguf.GGUFReader(str(path)).tensors}
    names = gguf.get_tensor_name_map(
        next(key for key, text in gguf.MODEL_ARCH_NAMES.items() if text == model_type.replace("gpt_", "gpt")), 2
    )
    compared = 0
    for name, module in frozen.named_modules():
        stem = names.get_name(f"{name}.weight", try_suffixes=(".weight",)) if isinstance(module, nn.Linear) else None
        if f"{stem}.lora_b" in held:
            A, B = held[f"{stem}.lora_a"], held[f"{stem}.lora_b"]
            change = model.get_submodule(name).weight.detach() - module.weight.detach()
            assert torch.allclose(B @ A / A.shape[0], order(name, change), atol=1e-5), name
            compared += 1
    assert compared == len(held) // 2 == (2 if "neox" in model_type or model_type in ("bloom", "falcon") else 4)


def test_a_gguf_lora_of_another_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"llama\.cpp takes plain LoRA"):
        write_gguf_lora(make("llama"), saved_of(tuned("llama", tt.DoRA(rank=2), "q")), tmp_path / "x.gguf")
    with pytest.raises(UserError, match=r"llama\.cpp takes plain LoRA"):
        write_gguf_lora(make("llama"), saved_of(tuned("llama", tt.LoKr(rank=2), "q")), tmp_path / "x.gguf")
    with pytest.raises(UserError, match="shares its weight"):
        write_gguf_lora(make("tied"), saved_of(tuned("tied", tt.LoRA(rank=2), "embed")), tmp_path / "x.gguf")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("shape", ["llama", "tied"])
def test_a_merged_model_comes_back_from_gguf_bit_for_bit(shape: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from tests.cli.conftest import tokenizer

    model = tuned(shape, tt.LoRA(rank=2), "q, k, down")
    tt.merge(model)
    model.resize_token_embeddings(len(tokenizer(True)))
    path = tmp_path / "model.gguf"
    words = tokenizer(True)
    count = write_gguf_model(model, words, path)
    assert count == len({id(value) for value in model.parameters()})
    names = [name for name, _ in model.named_parameters()]
    held = dict(read_weights(path, names, model.config))
    assert set(held) == set(names)
    assert all(torch.equal(held[name], value) for name, value in model.named_parameters())
    fields = gguf.GGUFReader(str(path)).fields
    assert fields["tokenizer.ggml.tokens"].contents() == [words.convert_ids_to_tokens(i) for i in range(len(words))]
    assert fields["llama.attention.head_count_kv"].contents() == 2
    assert fields["tokenizer.chat_template"].contents() == words.chat_template
    merges = json.loads(words.backend_tokenizer.to_str())["model"]["merges"]
    assert fields["tokenizer.ggml.merges"].contents() == [" ".join(one) for one in merges]


def test_other_architectures_and_tokenizers_are_refused(tmp_path: Path) -> None:
    from tests.cli.conftest import tokenizer

    with pytest.raises(UserError, match="architecture gpt2 is not written"):
        write_gguf_model(make("gpt2"), tokenizer(True), tmp_path / "x.gguf")
    with pytest.raises(UserError, match=r"no architecture for 't5'|architecture t5 is not written"):
        write_gguf_model(make("t5"), tokenizer(True), tmp_path / "x.gguf")
    assert VOCABULARY
    assert not any(tmp_path.iterdir())
