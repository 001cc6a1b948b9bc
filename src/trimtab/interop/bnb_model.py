"""A whole model in bitsandbytes' 4-bit keys, which transformers loads with bitsandbytes: our codes, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.code import Code
from trimtab.core.errors import UserError, listing
from trimtab.core.format import Format
from trimtab.core.quantized import quantized_modules
from trimtab.core.site import is_conv1d
from trimtab.storage import fp4, nf4
from trimtab.storage.dynamic8 import MAPS, Dynamic8

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Block sizes that bitsandbytes has kernels for."""
NESTED = 256


def write_bnb_model(model: nn.Module, tokenizer: Any, directory: str | Path) -> int:
    """Write weights, config and tokenizer of a model whose codes are NF4 or FP4; returns how many layers are coded.

    Every coded layer has the keys `weight`, `weight.absmax`, `weight.quant_map`, with double quantization also
    `weight.nested_absmax` and `weight.nested_quant_map`, and `weight.quant_state.bitsandbytes__nf4`. The rest stays
    dense. Errors: no codes; codes of another format, or with scales or blocks that bitsandbytes does not have.
    """
    from safetensors.torch import save_file

    coded: dict[str, Any] = {path: module._modules["code"] for path, module in quantized_modules(model)}
    check(coded)
    held: dict[str, Tensor] = {}
    shared: set[int] = set()
    for name, value in model.state_dict().items():
        path = name.rpartition(".code.")[0]
        if path in coded or value.data_ptr() in shared:
            continue
        shared.add(value.data_ptr())
        held[name] = value.detach().cpu().contiguous()
    for path, code in coded.items():
        held |= {f"{path}.{end}": value.cpu() for end, value in keys_of(code).items()}
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    config: Any = model.config
    config.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    written["quantization_config"] = settings(model, coded)
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    if getattr(model, "generation_config", None) is not None and model.can_generate():  # type: ignore[operator]
        model.generation_config.save_pretrained(folder)  # type: ignore[union-attr,operator]
    tokenizer.save_pretrained(folder)
    return len(coded)


def check(coded: dict[str, Any]) -> None:
    """Refuse what bitsandbytes has no keys for."""
    if not coded:
        raise UserError("convert: nothing in this model is quantized", fix="trimtab.quantize(model, NF4(double=True))")
    odd = {str(code.format) for code in coded.values() if why_not(code.format)}
    if odd:
        raise UserError(
            f"convert: bitsandbytes has no 4-bit keys for {listing(sorted(odd), 3)}",
            fix="a base in NF4(double=True), or in NF4() or FP4() with blocks of 64",
        )
    kinds = {(type(code.format), code.format.scale is None) for code in coded.values()}
    if len(kinds) > 1:
        raise UserError("convert: the layers are in different 4-bit formats, and config.json names one for all")


def why_not(format: Format) -> bool:
    """Whether a format is not one of bitsandbytes'."""
    if not isinstance(format, nf4.NF4 | fp4.FP4) or format.block_size not in BLOCKS:
        return True
    scale = format.scale
    if scale is None:
        return False
    return not (isinstance(scale, Dynamic8) and scale.block_size == NESTED and scale.signed and scale.center)


def keys_of(code: Code) -> dict[str, Tensor]:
    """The tensors of a coded weight by the end of their names."""
    format: Any = code.format
    tensors = code.tensors()
    kind, levels = ("nf4", nf4.LEVELS) if isinstance(format, nf4.NF4) else ("fp4", fp4.LEVELS)
    state: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": format.block_size,
        "dtype": str(code.dtype).removeprefix("torch."),
        "shape": list(code.shape),
    }
    found = {"weight": tensors["codes"].detach(), "weight.quant_map": levels.clone()}
    if format.scale is None:
        found["weight.absmax"] = tensors["absmax"].detach()
    else:
        found["weight.absmax"] = tensors["absmax_codes"].detach()
        found["weight.nested_absmax"] = tensors["absmax_absmax"].detach()
        found["weight.nested_quant_map"] = MAPS[True].clone()
        state |= {"nested_blocksize": format.scale.block_size, "nested_dtype": "float32"}
        state["nested_offset"] = float(tensors["absmax_offset"])
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return found | {f"weight.quant_state.bitsandbytes__{kind}": text}


def settings(model: nn.Module, coded: dict[str, Any]) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    code = next(iter(coded.values()))
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear) or is_conv1d(module)}
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4" if isinstance(code.format, nf4.NF4) else "fp4",
        "bnb_4bit_use_double_quant": code.format.scale is not None,
        "bnb_4bit_compute_dtype": str(code.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": sorted(linear - set(coded)),
    }
