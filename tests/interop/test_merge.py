"""Merging file by file equals merging in memory, changes nothing else, and takes the memory of one tensor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.interop.conftest import logits, make

import trimtab as tt
from trimtab.core.errors import UserError
from trimtab.interop import proof, shards
from trimtab.interop.saved import saved_of

METHODS: dict[str, tuple[Any, str | None]] = {
    "lora": (tt.LoRA(rank=2), "q, v, down"),
    "dora of a whole": (tt.DoRA(rank=2), "o, down"),
    "ia3": (tt.IA3(), "v, down"),
    "several": ([tt.LoRA(rank=2).at("q"), tt.LNTuning().at("norm"), tt.LoKr(rank=2).at("q, down")], None),
    "oft": (tt.OFT(block_size=4), "o"),
    "pissa": (tt.LoRA(rank=2, start=tt.PiSSA()), "o"),
    "randlora": (tt.RandLoRA(rank=8), "q, o"),
}


def tuned(shape: str, name: str) -> Any:
    model = make(shape)
    method, where = METHODS[name]
    tt.attach(model, method, where)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn_like(value))
    return model


def outlined(shape: str) -> Any:
    """A model without weights, its tied ones still tied."""
    model = make(shape)
    with torch.device("meta"):
        return type(model)(model.config)


def in_files(shape: str, directory: Path) -> Path:
    """A model as a checkpoint of several files."""
    make(shape).save_pretrained(directory, max_shard_size="20KB")
    assert len(shards.files_of(directory)) > 1
    return directory


@pytest.mark.parametrize("shape", ["llama", "gpt2", "bloom", "bert", "t5"])
@pytest.mark.parametrize("name", METHODS)
def test_file_by_file_equals_in_memory(shape: str, name: str, tmp_path: Path) -> None:
    base = in_files(shape, tmp_path / "base")
    model = tuned(shape, name)
    plan, saved = outlined(shape), saved_of(model)
    assert shards.why_not(plan, saved, base) is None
    (tmp_path / "out").mkdir()
    changed = shards.merge_shards(plan, saved, base, tmp_path / "out")
    before = logits(model)
    tt.merge(model)
    assert (before - logits(model)).abs().max() < 1e-4
    plan.config.save_pretrained(tmp_path / "out")
    again = type(plan).from_pretrained(tmp_path / "out").eval()
    held, wanted = again.state_dict(), model.state_dict()
    assert all(torch.allclose(held[key], wanted[key], atol=1e-6) for key in wanted)
    frozen = make(shape).state_dict()
    same = sum(torch.equal(held[key], frozen[key]) for key in frozen)
    assert 0 < changed <= len(frozen) - same + len(frozen) // 2
    assert (logits(again) - before).abs().max() < 1e-4


def test_a_bf16_checkpoint_is_rounded_once(tmp_path: Path) -> None:
    make("llama").bfloat16().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    model = make("llama").bfloat16()
    tt.attach(model, tt.LoRA(rank=2), "q, down", dtype=torch.float32)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn_like(value))
    (tmp_path / "out").mkdir()
    shards.merge_shards(outlined("llama"), saved_of(model), tmp_path / "base", tmp_path / "out")
    tt.merge(model)
    held = {}
    for path in shards.files_of(tmp_path / "out"):
        from safetensors.torch import load_file

        held |= load_file(path)
    assert all(torch.equal(held[key], value) for key, value in model.state_dict().items())


def test_headers_and_untouched_tensors_keep_their_bytes(tmp_path: Path) -> None:
    base = in_files("llama", tmp_path / "base")
    model = tuned("llama", "lora")
    (tmp_path / "out").mkdir()
    shards.merge_shards(outlined("llama"), saved_of(model), base, tmp_path / "out")
    for path in shards.files_of(base):
        header, start = shards.header_of(path)
        old, new = path.read_bytes(), (tmp_path / "out" / path.name).read_bytes()
        assert len(old) == len(new)
        assert old[:start] == new[:start]
        for name, entry in header.items():
            begin, end = (start + at for at in entry["data_offsets"])
            touched = any(word in name for word in ("q_proj", "v_proj", "down_proj"))
            assert (old[begin:end] == new[begin:end]) is not touched


def test_what_has_no_place_in_a_plain_model_is_refused() -> None:
    plan = outlined("llama")
    for method, where, reason in (
        (tt.OutputBias(), "o", "has no bias"),
        (tt.Houlsby(bottleneck=2), "ffn", "GELU between D and U"),
    ):
        model = make("llama")
        tt.attach(model, method, where)
        with pytest.raises(UserError, match=reason):
            shards.refuse(plan, saved_of(model))


def test_a_tied_head_is_left_to_the_merge_in_memory(tmp_path: Path) -> None:
    base = in_files("tied", tmp_path / "base")
    model = make("tied")
    tt.attach(model, tt.LoRA(rank=2), "embed")
    assert "shares its weight" in str(shards.why_not(outlined("tied"), saved_of(model), base))


def test_differences_are_what_they_say() -> None:
    rows = [[1, 2, 3], [4, 5]]
    one = [torch.log_softmax(torch.randn(len(row), 7), -1) for row in rows]
    other = [value.clone() for value in one]
    other[1][0, 3] += 0.25
    found = proof.difference(one, other, rows)
    assert found.largest == pytest.approx(0.25, abs=1e-6)
    assert found.mean == pytest.approx(0.25 / 35, abs=1e-6)
    assert found.loss == pytest.approx(-float((other[0][0, 2] + other[0][1, 3] + other[1][0, 5]) / 3), abs=1e-6)
    assert proof.difference(one, one, rows).greedy_agreement == 1.0
    other[0][1] = one[0][1].flip(0)
    assert proof.difference(one, other, rows).greedy_agreement in (0.8, 1.0)


def test_the_original_weights_win_only_by_clear_evidence() -> None:
    rows = [list(range(20))]
    one = [torch.log_softmax(torch.zeros(20, 21), -1)]
    better = [torch.log_softmax(3.0 * torch.nn.functional.one_hot(torch.arange(1, 21), 21).float(), -1)]
    assert proof.better(one, better, rows)
    assert not proof.better(better, one, rows)
    assert not proof.better(one, one, rows)


MEASURE = """
import pathlib, sys, threading, torch
from trimtab.interop import shards
from trimtab.interop.saved import open_saved
import transformers
config = transformers.LlamaConfig.from_pretrained(sys.argv[1])
with torch.device("meta"):
    plan = transformers.LlamaForCausalLM(config)
saved = open_saved(sys.argv[2])
def anonymous():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
before, seen, done = anonymous(), [], threading.Event()
def watch():
    while not done.wait(0.001):
        seen.append(anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
shards.merge_shards(plan, saved, pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[3]))
done.set()
watcher.join()
print(max(seen) - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells what is used")
def test_the_peak_is_at_most_a_fifth_over_the_largest_file(tmp_path: Path, source_environment: dict[str, str]) -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=2000, hidden_size=512, intermediate_size=1408, num_hidden_layers=30, num_attention_heads=8
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base", max_shard_size="100MB")
    tt.attach(model, tt.LoRA(rank=4), "all-linear")
    tt.save(model, tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    arguments = [str(tmp_path / name) for name in ("base", "adapter", "out")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], env=source_environment, capture_output=True, text=True, check=True
    )
    files = [path.stat().st_size for path in shards.files_of(tmp_path / "base")]
    assert len(files) > 3
    assert 1_000_000 < int(done.stdout) < 1.2 * max(files)
    assert json.loads((tmp_path / "out" / shards.INDEX).read_text())["weight_map"]
