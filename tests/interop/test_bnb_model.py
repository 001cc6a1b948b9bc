"""Our codes in bitsandbytes' keys: transformers and bitsandbytes read them, and so do we, bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.cli.conftest import save_model, write_rows

from trimtab.cli.main import main
from trimtab.core.errors import UserError
from trimtab.core.format import Format
from trimtab.core.quantized import quantize, quantized_modules
from trimtab.interop.bnb_model import write_bnb_model
from trimtab.models.loading import load
from trimtab.storage.absmax import Absmax
from trimtab.storage.fp4 import FP4
from trimtab.storage.nf4 import NF4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny", chat=True)


def written(base: Path, target: Path, format: Format) -> Any:
    loaded = load(base, dtype="float32", device="cpu")
    quantize(loaded.model, format)
    assert write_bnb_model(loaded.model, loaded.tokenizer, target) == 14
    return loaded.model


@pytest.mark.parametrize("format", [NF4(), NF4(double=True), FP4(128), FP4(double=True)], ids=str)
def test_what_is_written_is_read_back_bit_for_bit(base: Path, tmp_path: Path, format: Format) -> None:
    model = written(base, tmp_path / "out", format)
    again = load(tmp_path / "out", dtype="float32", device="cpu").model
    found = dict(quantized_modules(again))
    for path, module in quantized_modules(model):
        other: Any = found.pop(path)
        assert other.code.format == module.code.format
        for name, value in module.code.tensors().items():
            assert torch.equal(value, other.code.tensors()[name])
    assert not found
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("format", [NF4(), NF4(double=True), FP4()], ids=str)
def test_transformers_with_bitsandbytes_reads_it(base: Path, tmp_path: Path, format: Format) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = written(base, tmp_path / "out", format)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu", dtype=torch.float32)
    layers = {path: module for path, module in theirs.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert set(layers) == {path for path, _ in quantized_modules(model)}
    for path, module in layers.items():
        state: Any = copy.copy(module.weight.quant_state)
        shape, state.shape = state.shape, torch.Size([state.shape.numel()])
        W = bnb.functional.dequantize_4bit(module.weight.data, state).view(shape)
        assert torch.equal(W, model.get_submodule(path).weight)
    assert theirs.lm_head.weight.dtype == torch.float32


def test_what_bitsandbytes_has_not_is_refused(base: Path, tmp_path: Path) -> None:
    loaded = load(base, dtype="float32", device="cpu")
    with pytest.raises(UserError, match="nothing in this model is quantized"):
        write_bnb_model(loaded.model, loaded.tokenizer, tmp_path / "out")
    for format in (NF4(48), Absmax(), NF4(scale=Absmax(256))):
        model = load(base, dtype="float32", device="cpu").model
        quantize(model, format)
        with pytest.raises(UserError, match="has no 4-bit keys"):
            write_bnb_model(model, loaded.tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_merges_and_codes_a_run(base: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"say {n}", "completion": f"{n} it is"} for n in range(30)])
    run, out = str(tmp_path / "run"), tmp_path / "out"
    common = ["--steps", "3", "--dtype", "float32"]
    assert main(["tune", "--model", str(base), "--data", str(rows), *common, "--output", run]) == 0
    assert main(["convert", run, "--to", "bitsandbytes", "--out", str(out)]) == 0
    assert len(list(quantized_modules(load(out, dtype="float32", device="cpu").model))) == 14
    assert main(["convert", run, "--to", "bitsandbytes", "--out", str(out)]) != 0
