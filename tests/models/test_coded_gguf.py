"""GGUF files as frozen bases: numbers kept, values those of the package gguf, in every command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tests.cli.conftest import tokenizer, write_rows

from trimtab.cli.main import main
from trimtab.core.errors import UserError
from trimtab.core.quantized import quantized_modules
from trimtab.interop.gguf_model import write_gguf_model
from trimtab.models.coded.gguf_blocks import BYTES, coded, format_of
from trimtab.models.fingerprints import fingerprint
from trimtab.models.loading import load

TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2)}
HALVES |= {"Q6_K": (208,)}
"""Where the fp16 numbers of a block are; elsewhere any bytes will do."""


def random_blocks(kind: str, count: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    raw = draw.integers(0, 256, (count, BYTES[kind])).astype(np.uint8)
    for place in HALVES.get(kind, (0,)):
        raw[:, place : place + 2] = draw.uniform(0.0005, 0.02, (count, 1)).astype(np.float16).view(np.uint8)
    return raw


@pytest.mark.parametrize("kind", TYPES)
def test_blocks_stand_for_what_the_package_gguf_says(kind: str) -> None:
    width = 256 if kind.endswith("K") else 32
    raw = random_blocks(kind, 3 * 2)
    first = HALVES.get(kind, (0,))[0]
    raw[0, first : first + 2] = 0  # a scale of zero
    wanted = gguf.dequantize(raw.reshape(3, -1), getattr(gguf.GGMLQuantizationType, kind))
    assert wanted.shape == (3, 2 * width)
    found = coded(kind, torch.from_numpy(raw.reshape(3, -1)), (3, 2 * width), lambda rows: rows)
    assert found.format == format_of(kind)
    decoded = found.format.decode(found.tensors, found.shape).numpy()
    np.testing.assert_allclose(decoded, wanted, rtol=1e-6, atol=1e-7 * np.abs(wanted).max())
    blank = found.format.encode(torch.empty(found.shape, device="meta"))
    assert {name: (value.shape, value.dtype) for name, value in blank.items()} == {
        name: (value.shape, value.dtype) for name, value in found.tensors.items()
    }


def test_a_scale_that_is_no_number_is_refused() -> None:
    raw = random_blocks("Q4_0", 2)
    raw[1, :2] = [0, 0x7E]
    with pytest.raises(UserError, match="NaN"):
        coded("Q4_0", torch.from_numpy(raw), (2, 32), lambda rows: rows)


def requantized(source: Path, target: Path, kinds: list[str]) -> Path:
    """A copy of a GGUF file with its matrices of other types, in turn; random blocks where gguf cannot make them."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    for number, tensor in enumerate(reader.tensors):
        values = tensor.data.astype(np.float32)
        if values.ndim != 2:
            writer.add_tensor(tensor.name, values)
            continue
        kind = kinds[number % len(kinds)]
        code = getattr(gguf.GGMLQuantizationType, kind)
        try:
            raw = gguf.quantize(values, code)
        except NotImplementedError:
            raw = random_blocks(kind, values.size // 256, number).reshape(len(values), -1)
        writer.add_tensor(tensor.name, raw, raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    torch.manual_seed(0)
    words = tokenizer(chat=True)
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    path = tmp_path_factory.mktemp("gguf") / "plain.gguf"
    write_gguf_model(transformers.LlamaForCausalLM(config), words, path)
    return path


MIXES = (["Q4_0", "Q8_0"], ["Q4_1", "Q5_1"], ["Q4_K", "Q6_K"], ["Q2_K", "Q3_K", "Q5_K"])


@pytest.mark.parametrize("kinds", MIXES, ids=lambda kinds: "-".join(kinds))
def test_logits_are_those_of_transformers_own_reading(plain: Path, tmp_path: Path, kinds: list[str]) -> None:
    import transformers

    file = requantized(plain, tmp_path / "some.gguf", kinds)
    loaded = load(file, dtype="float32", device="cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    with torch.no_grad():
        ids = torch.arange(5, 40)[None]
        found, wanted = loaded.model(ids).logits, theirs.eval()(ids).logits
    assert float(wanted.std()) > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    assert len(list(quantized_modules(loaded.model))) == 14
    assert "codes of 14 layers" in loaded.notes[0] or "codes of 14 layers" in loaded.notes[1]


def test_what_is_decoded_is_said_and_what_is_no_file_refused(plain: Path, tmp_path: Path) -> None:
    loaded = load(plain, dtype="float32", device="cpu")
    assert len(list(quantized_modules(loaded.model))) == 0
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGML" + plain.read_bytes()[4:])
    with pytest.raises(UserError, match="no GGUF file"):
        load(broken, dtype="float32", device="cpu")
    broken.write_bytes(plain.read_bytes()[:300])
    with pytest.raises(UserError, match=r"broken\.gguf"):
        load(broken, dtype="float32", device="cpu")
    assert fingerprint(plain) != fingerprint(requantized(plain, tmp_path / "other.gguf", ["Q8_0"]))
    directory = tmp_path / "folder"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "m.gguf").write_bytes(plain.read_bytes())
    with pytest.raises(UserError, match=r"GGUF \(m\.gguf\)") as caught:
        load(directory, dtype="float32", device="cpu")
    assert f"--model {directory}" in caught.value.message


@pytest.mark.slow
def test_a_run_on_a_gguf_file(plain: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = requantized(plain, tmp_path / "some.gguf", ["Q4_0", "Q6_K"])
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"say {n}", "completion": f"{n} it is"} for n in range(30)])

    def run(*arguments: Any) -> Any:
        capfd.readouterr()
        code = main([*map(str, arguments), "--json"])
        found: Any = capfd.readouterr()
        assert code == 0, found
        return json.loads(found.out)

    run("tune", "--model", file, "--data", rows, "--steps", 4, "--dtype", "float32", "--output", tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["after"]["loss"] < record["before"]["loss"]
    measured = run("eval", tmp_path / "run", "--data", rows)
    assert measured
    merged = run("merge", tmp_path / "run", "--out", tmp_path / "merged")
    assert merged["equal"] is True
    assert merged["largest_log_probability_difference"] < 1e-4
    assert run("plan", "--model", file, "--max-length", 64)["memory"]["weights"] > 0
    file.write_bytes(requantized(plain, tmp_path / "other.gguf", ["Q8_0"]).read_bytes())
    capfd.readouterr()
    assert main(["chat", str(tmp_path / "run"), "--prompt", "say 3"]) != 0
    assert "is not the model this adapter was trained on" in capfd.readouterr().err
