"""Models that bitsandbytes and GPTQ tools have quantized: their codes bit for bit, and logits as in NumPy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tests.models import packers

from trimtab.core.bits import unpack
from trimtab.core.errors import UserError
from trimtab.core.quantized import quantized_modules
from trimtab.models.coded.bitsandbytes import FourBits
from trimtab.models.coded.gptq import GPTQWords
from trimtab.models.loading import load, outline
from trimtab.storage.affine import Affine
from trimtab.storage.permuted import Permuted

Pack = Callable[[np.random.Generator, int, int], tuple[dict[str, np.ndarray], np.ndarray]]
BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
BNB8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def gptq_settings(bits: int, group: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, **more}


def coded_copy(plain: Path, target: Path, settings: dict[str, Any], pack: Pack, skip: str = "lm_head") -> Path:
    """Two directories from a dense one: `target` with codes, and `target-dense` with what they stand for."""
    dense = target.with_name(f"{target.name}-dense")
    draw = np.random.default_rng(0)
    tensors = load_file(plain / "model.safetensors")
    values, codes = dict(tensors), dict(tensors)
    for name, W in tensors.items():
        if W.ndim != 2 or ("proj" not in name and ".c_" not in name) or skip in name:
            continue
        turned = ".c_" in name  # a Conv1D keeps (in, out); tools code it as (out, in)
        packed, stands_for = pack(draw, *(W.shape[::-1] if turned else W.shape))
        values[name] = np.ascontiguousarray(stands_for.T if turned else stands_for).astype(np.float32)
        del codes[name]
        codes |= {f"{name.removesuffix('.weight')}.{end}": value for end, value in packed.items()}
    for directory, held, extra in ((target, codes, {"quantization_config": settings}), (dense, values, {})):
        directory.mkdir()
        for file in plain.iterdir():
            if file.suffix == ".json":
                (directory / file.name).write_bytes(file.read_bytes())
        config = json.loads((plain / "config.json").read_text()) | extra
        (directory / "config.json").write_text(json.dumps(config))
        save_file(held, directory / "model.safetensors", {"format": "pt"})
    return target


def logits(directory: Path) -> torch.Tensor:
    loaded = load(directory, dtype="float32", device="cpu")
    with torch.no_grad():
        return loaded.model(torch.arange(2, 20)[None]).logits


CASES: dict[str, tuple[dict[str, Any], Pack]] = {
    "nf4": (BNB4, lambda d, o, i: packers.four_bits(d, o, i, "nf4", 64, False)),
    "nf4 double": (BNB4, lambda d, o, i: packers.four_bits(d, o, i, "nf4", 64, True)),
    "nf4 small blocks, double": (BNB4, lambda d, o, i: packers.four_bits(d, o, i, "nf4", 2, True)),
    "fp4": (BNB4, lambda d, o, i: packers.four_bits(d, o, i, "fp4", 128, False)),
    "fp4 double": (BNB4, lambda d, o, i: packers.four_bits(d, o, i, "fp4", 64, True)),
    "int8": (BNB8, packers.eight_bits),
    **{
        f"gptq {bits} bits": (gptq_settings(bits, 8), lambda d, o, i, b=bits: packers.gptq(d, o, i, b, 8, "plain"))
        for bits in (2, 3, 4, 8)
    },
    "gptq v2": (
        gptq_settings(4, 8, checkpoint_format="gptq_v2"),
        lambda d, o, i: packers.gptq(d, o, i, 4, 8, "plain", "gptq_v2"),
    ),
    "gptq desc_act": (gptq_settings(4, 8, desc_act=True), lambda d, o, i: packers.gptq(d, o, i, 4, 8, "desc_act")),
    "gptq 3 bits desc_act": (gptq_settings(3, 16), lambda d, o, i: packers.gptq(d, o, i, 3, 16, "desc_act")),
    "gptq one group": (gptq_settings(4, -1), lambda d, o, i: packers.gptq(d, o, i, 4, -1, "plain")),
    "gptq uneven groups": (gptq_settings(4, 12), lambda d, o, i: packers.gptq(d, o, i, 4, 12, "plain")),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("width", [(16, 32), (20, 27)], ids=["even", "odd"])
def test_logits_are_those_of_the_dense_model(
    model_directory: Any, tmp_path: Path, case: str, width: tuple[int, int]
) -> None:
    settings, pack = CASES[case]
    hidden, inner = width
    plain = model_directory("LlamaForCausalLM", name="plain", hidden_size=hidden, intermediate_size=inner)
    coded = coded_copy(plain, tmp_path / "coded", settings, pack)
    found, wanted = logits(coded), logits(tmp_path / "coded-dense")
    assert float(wanted.std()) > 0.01
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    model = load(coded, dtype="float32", device="cpu").model
    assert len(list(quantized_modules(model))) == 14
    blank = {path: module.code.format for path, module in quantized_modules(outline(coded))}
    assert blank == {path: module.code.format for path, module in quantized_modules(model)}


def test_codes_are_the_file_s_own_bits(model_directory: Any, tmp_path: Path) -> None:
    plain = model_directory("LlamaForCausalLM", name="plain")
    coded = coded_copy(plain, tmp_path / "coded", *CASES["nf4 double"])
    held = load_file(coded / "model.safetensors")
    for path, module in quantized_modules(load(coded, dtype="float32", device="cpu").model):
        code = module.code.tensors()
        assert np.array_equal(code["codes"].numpy(), held[f"{path}.weight"])
        assert np.array_equal(code["absmax_codes"].numpy(), held[f"{path}.weight.absmax"])
        assert np.array_equal(code["absmax_absmax"].numpy(), held[f"{path}.weight.nested_absmax"])


def test_gptq_codes_keep_their_numbers_and_columns(model_directory: Any, tmp_path: Path) -> None:
    plain = model_directory("LlamaForCausalLM", name="plain")
    numbers: list[np.ndarray] = []

    def pack(draw: np.random.Generator, out: int, into: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        tensors, W = packers.gptq(draw, out, into, 4, 8, "desc_act")
        words = tensors["qweight"].view(np.uint32)
        numbers.append(np.stack([words[i // 8] >> 4 * (i % 8) & 15 for i in range(into)], 1))
        return tensors, W

    coded = coded_copy(plain, tmp_path / "coded", gptq_settings(4, 8), pack)
    found = dict(quantized_modules(load(coded, dtype="float32", device="cpu").model))
    module: Any = found["model.layers.0.mlp.down_proj"]
    assert isinstance(module.code.format, Permuted)
    assert module.code.format.inner == Affine(4, 8)
    tensors = module.code.tensors()
    flat = unpack(tensors["codes"], 4, module.code.shape[0] * module.code.shape[1]).view(module.code.shape)
    back = torch.empty_like(flat)
    back[:, tensors["order"].long()] = flat
    assert any(np.array_equal(back.numpy(), one) for one in numbers)


def test_a_transposed_linear_layer(model_directory: Any, tmp_path: Path) -> None:
    plain = model_directory("GPT2LMHeadModel", name="plain")
    coded = coded_copy(plain, tmp_path / "coded", *CASES["nf4 double"])
    torch.testing.assert_close(logits(coded), logits(tmp_path / "coded-dense"), rtol=1e-5, atol=1e-5)


def test_a_classifier_on_codes_draws_its_head_by_the_seed(model_directory: Any, tmp_path: Path) -> None:
    plain = model_directory("LlamaForCausalLM", name="plain")
    coded = coded_copy(plain, tmp_path / "coded", *CASES["nf4"])
    heads = [
        load(coded, task="classify", labels=["no", "yes"], dtype="float32", device="cpu", head_seed=seed)
        for seed in (1, 1, 2)
    ]
    assert heads[0].new_modules == ("score",)
    one, same, other = (loaded.model.score.weight for loaded in heads)
    assert float(one.detach().abs().max()) > 0
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def spoiled(directory: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


LAYER = "model.layers.0.self_attn.q_proj"


def removed(end: str) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors[f"{LAYER}.{end}"]

    return change


def changed(end: str, how: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{LAYER}.{end}"] = how(tensors[f"{LAYER}.{end}"])

    return change


@pytest.mark.parametrize(
    ("case", "change", "told"),
    [
        ("nf4 double", removed("weight.nested_absmax"), "weight.nested_absmax` is missing"),
        ("nf4 double", removed("weight.quant_state.bitsandbytes__nf4"), "is missing"),
        ("nf4 double", removed("weight"), "`weight` is missing"),
        ("nf4", changed("weight.absmax", lambda a: a[:-1].copy()), "values of float32"),
        ("nf4", changed("weight.absmax", lambda a: a * np.float32("nan")), "infinite or NaN"),
        ("nf4", changed("weight.quant_map", lambda a: a * np.float32(0.5)), "table of levels of its own"),
        ("nf4", changed("weight.quant_state.bitsandbytes__nf4", lambda a: a[:-9].copy()), "no record"),
        ("int8", changed("weight_format", lambda a: np.array(1, dtype=np.uint8)), "an order for one kind of GPU"),
        ("int8", removed("SCB"), "`SCB` is missing"),
        ("gptq 4 bits", removed("scales"), "`scales` is missing"),
        ("gptq 4 bits", removed("qzeros"), "`qzeros` is missing"),
        ("gptq 4 bits", changed("qweight", lambda a: a[:-1].copy()), "4-bit codes do not make"),
        ("gptq 4 bits", changed("g_idx", lambda a: a + np.int32(9)), "not of 2 groups"),
        ("gptq 4 bits", changed("scales", lambda a: a * np.float16("inf")), "infinite or NaN"),
    ],
)
def test_damage_is_named(model_directory: Any, tmp_path: Path, case: str, change: Any, told: str) -> None:
    plain = model_directory("LlamaForCausalLM", name="plain")
    coded = spoiled(coded_copy(plain, tmp_path / "coded", *CASES[case]), change)
    with pytest.raises(UserError) as caught:
        load(coded, dtype="float32", device="cpu")
    assert told in caught.value.message
    assert LAYER in caught.value.message
    assert caught.value.fix


@pytest.mark.parametrize(
    ("settings", "told", "fix"),
    [
        ({"quant_method": "awq", "bits": 4}, "'awq'", "affine"),
        ({"quant_method": "hqq"}, "'hqq'", "quantize: hqq"),
        ({"quant_method": "compressed-tensors"}, "'compressed-tensors'", "as it was before"),
        (gptq_settings(5, 128), "bits 5", "config.json"),
        (gptq_settings(4, 128, checkpoint_format="marlin"), "'marlin'", "gptq"),
        (BNB4, "hold no *.weight.absmax", "config.json"),
    ],
)
def test_what_is_not_read_is_said(
    model_directory: Any, tmp_path: Path, settings: dict[str, Any], told: str, fix: str
) -> None:
    plain = model_directory("LlamaForCausalLM", name="plain")
    config = json.loads((plain / "config.json").read_text()) | {"quantization_config": settings}
    (plain / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        load(plain, dtype="float32", device="cpu")
    assert told in caught.value.message
    assert fix in str(caught.value.fix)


def test_a_tied_output_layer_in_codes_is_refused(model_directory: Any, tmp_path: Path) -> None:
    plain = model_directory("LlamaForCausalLM", name="plain", tie_word_embeddings=False)
    target = tmp_path / "coded"
    coded = coded_copy(plain, target, *CASES["nf4"])
    tensors, _ = packers.four_bits(np.random.default_rng(1), 21, 16, "nf4", 64, False)

    def with_output(held: dict[str, np.ndarray]) -> None:
        del held["lm_head.weight"]
        held |= {f"lm_head.{end}": value for end, value in tensors.items()}

    spoiled(coded, with_output)
    config = json.loads((coded / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(UserError, match="ties its weight"):
        load(coded, dtype="float32", device="cpu")
    (coded / "config.json").write_text(json.dumps(config))
    assert "lm_head" in dict(quantized_modules(load(coded, dtype="float32", device="cpu").model))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("stored", [None, np.uint16])
def test_an_odd_number_of_four_bit_codes(kind: str, double: bool, stored: Any) -> None:
    for out, into in ((3, 5), (1, 1), (7, 9), (129, 131)):
        tensors, W = packers.four_bits(np.random.default_rng(2), out, into, kind, 64, double)
        if stored is not None and tensors["weight"].size % 2 == 0:
            tensors["weight"] = tensors["weight"].reshape(-1, 2).view(stored)
        held = {end: torch.from_numpy(value) for end, value in tensors.items()}
        coded = FourBits().read(held.get)
        found = coded.format.decode(coded.tensors, coded.shape)
        np.testing.assert_allclose(found.numpy(), W, rtol=0, atol=1e-7)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", ["plain", "desc_act"])
@pytest.mark.parametrize("sizes", [(5, 7, 3), (33, 65, 32), (1, 40, -1)])
def test_gptq_of_odd_sizes(bits: int, order: str, sizes: tuple[int, int, int]) -> None:
    out, into, group = sizes
    tensors, W = packers.gptq(np.random.default_rng(3), out, into, bits, group, order)
    held = {end: torch.from_numpy(value) for end, value in tensors.items()}
    coded = GPTQWords(bits, group, shift=1).read(held.get)
    np.testing.assert_allclose(coded.format.decode(coded.tensors, coded.shape).numpy(), W, rtol=0, atol=1e-6)


def test_gptq_without_g_idx_takes_neighbours() -> None:
    tensors, W = packers.gptq(np.random.default_rng(3), 16, 64, 4, 16, "plain")
    del tensors["g_idx"]
    coded = GPTQWords(4, 16, shift=1).read({end: torch.from_numpy(value) for end, value in tensors.items()}.get)
    np.testing.assert_allclose(coded.format.decode(coded.tensors, coded.shape).numpy(), W, rtol=0, atol=1e-6)
