"""Every command over a base that another tool has quantized: tuned, talked to, measured, planned, merged, resumed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.models import packers
from tests.models.test_coded_checkpoints import BNB4, BNB8, coded_copy, gptq_settings

KINDS: dict[str, Any] = {
    "nf4": (BNB4, lambda d, o, i: packers.four_bits(d, o, i, "nf4", 64, True)),
    "int8": (BNB8, packers.eight_bits),
    "gptq": (gptq_settings(3, 16, desc_act=True), lambda d, o, i: packers.gptq(d, o, i, 3, 16, "desc_act")),
}
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: coded_copy(chat_model, folder / name, *kind, skip="embed") for name, kind in KINDS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_base_in_codes_of_another_tool(
    trimtab: Run, bases: dict[str, Path], prompts: Path, tmp_path: Path, kind: str
) -> None:
    base = bases[kind]
    common = ["--data", prompts, "--steps", "6", "--learning-rate", "1e-2", "--dtype", "float32", "--json"]
    done = trimtab("tune", "--model", base, *common, "--output", tmp_path / "run")
    assert done.code == 0, done.err
    dense = trimtab("tune", "--model", f"{base}-dense", *common, "--output", tmp_path / "dense")
    for moment in ("before", "after"):
        losses = [json.loads((tmp_path / one / "run.json").read_text())[moment]["loss"] for one in ("run", "dense")]
        assert losses[0] == pytest.approx(losses[1], abs=2e-4)
    assert dense.code == 0
    measured = trimtab("eval", tmp_path / "run", "--data", prompts, "--json")
    assert measured.code == 0, measured.err
    assert trimtab("chat", tmp_path / "run", "--prompt", "say red dog").code == 0
    planned = trimtab("plan", "--model", base, "--json")
    assert planned.code == 0, planned.err
    blank = trimtab("plan", "--model", f"{base}-dense", "--json")
    assert planned.document["memory"]["weights"] < blank.document["memory"]["weights"]
    merged = trimtab("merge", tmp_path / "run", "--out", tmp_path / "merged", "--json")
    assert merged.code == 0, merged.err
    assert merged.document["equal"] is True
    assert merged.document["largest_log_probability_difference"] < 1e-4
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    refused = trimtab("merge", tmp_path / "run", "--out", tmp_path / "no", "--into", "original")
    assert refused.code != 0
    assert "came in codes" in refused.err
    twice = trimtab("tune", "--model", base, *common, "--quantize", "hqq", "--output", tmp_path / "twice")
    assert twice.code != 0
    assert "in codes already" in twice.document["error"]


def test_a_base_whose_codes_changed_is_refused(
    trimtab: Run, bases: dict[str, Path], prompts: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    base = tmp_path / "base"
    base.mkdir()
    for file in bases["nf4"].iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    assert trimtab("tune", "--model", base, "--data", prompts, "--steps", "1", "--output", tmp_path / "run").code == 0
    tensors = load_file(base / "model.safetensors")
    name = next(name for name in tensors if name.endswith(".weight.absmax"))
    tensors[name] = tensors[name] ^ np.uint8(1)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    done = trimtab("chat", tmp_path / "run", "--prompt", "say red dog")
    assert done.code != 0
    assert "is not the model this adapter was trained on" in done.err


@pytest.mark.slow
@pytest.mark.parametrize("double", [False, True])
def test_what_transformers_and_bitsandbytes_save(chat_model: Path, tmp_path: Path, double: bool) -> None:
    """The peer's own file: every weight bit for bit what bitsandbytes decodes."""
    bnb = pytest.importorskip("bitsandbytes")
    import torch
    import transformers

    from trimtab.models.loading import load

    chosen: Any = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double}
    settings = transformers.BitsAndBytesConfig(**chosen)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        chat_model, dtype=torch.float32, quantization_config=settings, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "theirs")
    transformers.AutoTokenizer.from_pretrained(chat_model).save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs", dtype="float32", device="cpu").model
    count = 0
    for path, module in theirs.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state: Any = copy.copy(module.weight.quant_state)
            shape, state.shape = state.shape, torch.Size([state.shape.numel()])
            # As one row: of rows that are no whole blocks, its kernel for CPUs (0.50.2) takes wrong scales.
            W = bnb.functional.dequantize_4bit(module.weight.data, state).view(shape)
            assert torch.equal(W, ours.get_submodule(path).weight)
            count += 1
    assert count == 14
