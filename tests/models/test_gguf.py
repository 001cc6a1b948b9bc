"""GGUF weights: read back what the gguf package wrote, in the row order of transformers."""

import subprocess
import sys
from pathlib import Path

import gguf
import numpy
import pytest
import torch
import transformers

from trimtab.core.errors import UserError
from trimtab.models.gguf import halves_from_pairs, read_weights


def small_llama(tied: bool = True) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


def pairs_from_halves(weight: numpy.ndarray, heads: int) -> numpy.ndarray:
    """What llama.cpp's converter does to q and k, written row by row."""
    size = weight.shape[0] // heads
    out = numpy.empty_like(weight)
    for head in range(heads):
        for row in range(size // 2):
            out[head * size + 2 * row] = weight[head * size + row]
            out[head * size + 2 * row + 1] = weight[head * size + size // 2 + row]
    return out


def write(model: transformers.PreTrainedModel, path: Path, extra: dict[str, numpy.ndarray] | None = None) -> None:
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, "llama")
    for name, weight in model.named_parameters():
        values = weight.detach().numpy()
        if "q_proj" in name:
            values = pairs_from_halves(values, config.num_attention_heads)
        if "k_proj" in name:
            values = pairs_from_halves(values, config.num_key_value_heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_comes_back(tmp_path: Path, tied: bool) -> None:
    model = small_llama(tied)
    write(model, tmp_path / "m.gguf", {"rope_freqs.weight": numpy.ones(4, numpy.float32)})
    wanted = dict(model.named_parameters())
    found = dict(read_weights(tmp_path / "m.gguf", list(wanted), model.config))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_order_of_rows_is_undone() -> None:
    weight = torch.arange(24.0).reshape(12, 2)
    assert torch.equal(halves_from_pairs(torch.from_numpy(pairs_from_halves(weight.numpy(), 3)), 3), weight)


def test_a_tensor_nobody_takes_is_an_error(tmp_path: Path) -> None:
    model = small_llama()
    write(model, tmp_path / "m.gguf", {"blk.0.strange.weight": numpy.ones(4, numpy.float32)})
    with pytest.raises(UserError, match=r"no parameter of a llama model takes: blk\.0\.strange\.weight"):
        list(read_weights(tmp_path / "m.gguf", [name for name, _ in model.named_parameters()], model.config))


def test_needs_no_accelerate(tmp_path: Path) -> None:
    """transformers reads GGUF weights only beside accelerate, which Trimtab does not require."""
    model = small_llama()
    write(model, tmp_path / "m.gguf")
    names = [name for name, _ in model.named_parameters()]
    code = f"""
import sys
sys.modules["accelerate"] = None
import transformers
from pathlib import Path
from trimtab.models.gguf import read_weights
config = transformers.LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
print(len(dict(read_weights(Path({str(tmp_path / "m.gguf")!r}), {names}, config))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == str(len(names)), done.stderr
