"""Adapters that AdapterHub's library (1.3.0, transformers 4.57) wrote for tiny models give its logits here.

`adapterhub/` holds the models' weights, one directory per adapter as the library saved it, and the logits it computed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import trimtab as tt
from trimtab.core.errors import UserError

HERE = Path(__file__).parent / "adapterhub"
CASES = sorted(path.name for path in HERE.iterdir() if path.is_dir())
SIZES = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 32}


def model_of(case: str) -> Any:
    import transformers

    kind = case.split("_")[0]
    if kind == "bert":
        model: Any = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=3))
    else:
        config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=False)
        model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(load_file(HERE / f"{kind}.safetensors"))
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_their_adapters_give_their_logits(case: str) -> None:
    expected = load_file(HERE / "expected.safetensors")
    model = model_of(case)
    with torch.no_grad():
        before = model(input_ids=expected["ids"]).logits
        tt.load(model, HERE / case)
        after = model.eval()(input_ids=expected["ids"]).logits
    assert (after - expected[case]).abs().max() < 1e-5
    assert (before - expected[case]).abs().max() > 1e-3


def test_the_kinds_are_those_of_the_list() -> None:
    assert {case.split("_", 1)[1] for case in CASES} >= {"seq_bn", "twice", "par", "lora", "ia3", "prefix", "loreft"}


def test_what_does_not_fit_is_listed_and_pickles_are_not_read(tmp_path: Path) -> None:
    shutil.copytree(HERE / "bert_seq_bn", tmp_path / "a")
    path = tmp_path / "a" / "adapter.safetensors"
    tensors = load_file(path)
    wrong = {key.replace("layer.0", "layer.9"): value for key, value in tensors.items()}
    save_file(wrong, path)
    with pytest.raises(UserError, match=r"1 problems\):\n    bert\.encoder\.layer\.9"):
        tt.load(model_of("bert"), tmp_path / "a")
    path.rename(tmp_path / "a" / "pytorch_adapter.bin")
    with pytest.raises(UserError, match="pickle"):
        tt.load(model_of("bert"), tmp_path / "a")


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("bert_seq_bn", {"inv_adapter": "nice"}),
        ("bert_seq_bn", {"non_linearity": "leakyrelu"}),
        ("bert_lora", {"use_gating": True}),
        ("bert_prefix", {"architecture": "union"}),
    ],
)
def test_options_without_a_counterpart_are_refused(case: str, change: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(HERE / case, tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    told = json.loads(path.read_text())
    told["config"] |= change
    path.write_text(json.dumps(told))
    with pytest.raises(UserError, match="AdapterHub"):
        tt.load(model_of(case), tmp_path / "a")
