"""Adapters from the command line: converted, combined, merged with a proof, with a context of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import save_model

from trimtab.cli.main import main

Run = Callable[..., Any]
COMMON = ("--steps", "4", "--heldout", "4", "--learning-rate", "0.05", "--dtype", "float32")


def tuned(where: Path, model: Path, rows: Path, *more: str) -> Path:
    assert main(["tune", "--model", str(model), "--data", str(rows), *COMMON, *more, "--output", str(where)]) == 0
    return where


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, chat_model: Path, prompts: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    several = folder / "several"
    shutil.copytree(chat_model, several)
    in_files(several)
    return {
        "lora": tuned(folder / "lora", chat_model, prompts, "--method", "lora"),
        "other": tuned(folder / "other", chat_model, prompts, "--method", "lora", "--seed", "1"),
        "lokr": tuned(folder / "lokr", chat_model, prompts, "--method", "lokr"),
        "nf4": tuned(folder / "nf4", chat_model, prompts, "--method", "lora", "--quantize", "nf4"),
        "long": tuned(folder / "long", chat_model, prompts, "--method", "lora", "--context", "256"),
        "files": tuned(folder / "files", several, prompts, "--method", "lora", "--where", "q, down"),
    }


def in_files(directory: Path) -> None:
    """Split the checkpoint of a model into several files."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="30KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 1


def test_to_peft_and_back(trimtab: Run, made: dict[str, Path], tmp_path: Path) -> None:
    done = trimtab("convert", made["lora"], "--out", tmp_path / "peft", "--json")
    assert done.code == 0, done.err
    assert done.document["peft_type"] == "LORA"
    assert {one["program"]: one["accepts"] for one in done.document["servable"]} == dict.fromkeys(
        ("vLLM", "llama.cpp", "Ollama", "PEFT"), True
    )
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    done = trimtab("convert", tmp_path / "peft", "--out", tmp_path / "back", "--json")
    assert done.code == 0, done.err
    assert trimtab("convert", tmp_path / "back", "--out", tmp_path / "again").code == 0
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in ("peft", "again"))
    assert first.read_bytes() == second.read_bytes()
    done = trimtab("merge", tmp_path / "peft", "--out", tmp_path / "merged", "--json")
    assert done.code == 0, done.err
    assert done.document["equal"]
    assert "trimtab convert" in trimtab("inspect", tmp_path / "peft").err


def test_to_a_plain_lora_and_gguf(trimtab: Run, made: dict[str, Path], tmp_path: Path) -> None:
    done = trimtab("convert", made["lokr"], "--to", "lora", "--rank", "2", "--out", tmp_path / "lora", "--json")
    assert done.code == 0, done.err
    assert done.document["rank"] == 2
    assert 0 < done.document["largest_weight_error"] < 1
    assert done.document["log_probabilities"]["largest"] > 0
    done = trimtab("convert", made["lokr"], "--to", "gguf", "--out", tmp_path / "no.gguf")
    assert (done.code, "llama.cpp takes plain LoRA" in done.err) == (2, True)
    assert trimtab("convert", made["lora"], "--to", "gguf", "--out", tmp_path / "yes.gguf").code == 0
    assert trimtab("convert", made["lora"], "--to", "gguf-model", "--out", tmp_path / "model.gguf").code == 0
    done = trimtab("convert", made["lokr"], "--out", tmp_path / "peft")
    assert "it is no LoRA (LOKR)" in done.out
    done = trimtab("convert", made["lora"], "--rank", "2", "--out", tmp_path / "x")
    assert (done.code, "are for --to lora" in done.err) == (2, True)
    assert {path.name for path in tmp_path.iterdir()} == {"lora", "yes.gguf", "model.gguf", "peft"}


def test_combine(trimtab: Run, made: dict[str, Path], tmp_path: Path) -> None:
    both = (made["lora"], made["other"])
    done = trimtab("combine", *both, "--how", "ties", "--weights", "1,0.5", "--out", tmp_path / "ties", "--json")
    assert done.code == 0, done.err
    assert done.document["weights"] == [1.0, 0.5]
    assert trimtab("combine", made["lora"], "--how", "dare_ties", "--out", tmp_path / "one").code == 0
    same = (tmp_path / "one" / "adapter.safetensors").read_bytes()
    assert same == (made["lora"] / "adapter" / "adapter.safetensors").read_bytes()
    done = trimtab("combine", *both, "--weights", "1", "--out", tmp_path / "x")
    assert (done.code, "1 weights for 2 adapters" in done.err) == (2, True)
    done = trimtab("combine", *both, "--weights", "one,two", "--out", tmp_path / "x")
    assert (done.code, "are no numbers" in done.err) == (2, True)
    done = trimtab("combine", made["lora"], made["files"], "--out", tmp_path / "x")
    assert (done.code, "different base models" in done.err) == (2, True)


def test_a_proof_lies_beside_a_merged_model(trimtab: Run, made: dict[str, Path], prompts: Path, tmp_path: Path) -> None:
    done = trimtab("merge", made["lora"], "--out", tmp_path / "a", "--data", prompts, "--rows", "7", "--json")
    assert done.code == 0, done.err
    proof = json.loads((tmp_path / "a" / "proof.json").read_text())
    assert proof["rows"] == 7
    assert str(prompts) in proof["compared_on"]
    assert proof["differences"]["reloaded"]["greedy_agreement"] == 1.0
    assert proof["differences"]["reloaded"]["largest"] == done.document["largest_log_probability_difference"] < 1e-4
    assert proof["equal"] is True


def test_a_quantized_base_is_measured_both_ways(trimtab: Run, made: dict[str, Path], tmp_path: Path) -> None:
    done = trimtab("merge", made["nf4"], "--out", tmp_path / "a", "--into", "dequantized", "--json")
    assert done.code == 0, done.err
    found = done.document["differences"]
    assert found["reloaded"]["largest"] < 1e-4
    assert found["into the original"]["largest"] > 1e-3
    assert found["requantized"]["largest"] > 1e-3
    assert done.document["base"] == "dequantized"
    done = trimtab("merge", made["nf4"], "--out", tmp_path / "b", "--into", "original", "--json")
    assert done.document["base"] == "original"
    assert done.document["differences"]["reloaded"]["largest"] == pytest.approx(
        done.document["differences"]["into the original"]["largest"], rel=1e-3
    )
    done = trimtab("merge", made["lora"], "--out", tmp_path / "c", "--into", "original")
    assert (done.code, "this one is dense" in done.err) == (2, True)


def test_a_checkpoint_of_several_files_is_merged_file_by_file(
    trimtab: Run, made: dict[str, Path], tmp_path: Path
) -> None:
    done = trimtab("merge", made["files"], "--out", tmp_path / "a", "--json")
    assert done.code == 0, done.err
    assert done.document["written"].startswith("file by file")
    assert done.document["equal"]
    assert trimtab("merge", made["files"], "--out", tmp_path / "b", "--no-proof").code == 0
    for path in sorted((tmp_path / "a").glob("model-*.safetensors")):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert not (tmp_path / "b" / "proof.json").exists()
    assert (tmp_path / "b" / "tokenizer.json").is_file()
    done = trimtab("merge", made["nf4"], "--out", tmp_path / "c", "--no-proof")
    assert (done.code, "is for a dense base" in done.err) == (2, True)


def test_an_adapter_alone_knows_its_lengthened_context(
    trimtab: Run, made: dict[str, Path], chat_model: Path, tmp_path: Path
) -> None:
    alone = shutil.copytree(made["long"] / "adapter", tmp_path / "alone")
    done = trimtab("merge", alone, "--model", chat_model, "--out", tmp_path / "a")
    assert done.code == 0, done.err
    assert trimtab("merge", made["long"], "--out", tmp_path / "b").code == 0
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in "ab"]
    assert configs[0]["max_position_embeddings"] == configs[1]["max_position_embeddings"] == 256
    assert configs[0]["rope_parameters"] == configs[1]["rope_parameters"]
    assert configs[0]["rope_parameters"]["factor"] == 2.0


def test_another_base_model_is_refused(trimtab: Run, made: dict[str, Path], tmp_path: Path) -> None:
    alone = shutil.copytree(made["lora"] / "adapter", tmp_path / "alone")
    other = save_model(tmp_path / "other", chat=True, seed=3)
    done = trimtab("convert", alone, "--model", other, "--out", tmp_path / "x")
    assert (done.code, "is not the model this adapter was trained on" in done.err) == (2, True)
