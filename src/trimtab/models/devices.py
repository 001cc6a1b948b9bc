"""Which device a model is on, and which floating type its weights have."""

from __future__ import annotations

import re
from typing import Any

import torch

from trimtab.core.errors import UserError, listing
from trimtab.models.files import first_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def device_of(name: str) -> torch.device:
    """The device of that name, proven by putting a tensor there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("the meta device holds no weights")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise UserError(
            f"device {name!r} cannot be used: {first_line(error)}",
            fix="use device auto or cpu, or see what torch supports",
        ) from error
    return device


def auto_dtype(device: torch.device) -> tuple[torch.dtype, str | None]:
    """bfloat16 where the hardware multiplies it natively, else float32; with a note if it is not float32."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16, "dtype auto: bfloat16, which this GPU multiplies natively"
    if device.type == "cpu":
        probes = {"AMX": "_is_amx_tile_supported", "AVX512-BF16": "_is_avx512_bf16_supported"}
        fast = [name for name, probe in probes.items() if getattr(torch.cpu, probe, bool)()]
        if fast:
            return torch.bfloat16, f"dtype auto: bfloat16, which this CPU multiplies natively ({listing(fast)})"
    return torch.float32, None


def level(model: Any, dtype: torch.dtype) -> None:
    """Brings to `dtype` what the model makes in float32 without asking to keep it so: DeBERTa's q_bias and v_bias."""
    kept = {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    kept |= {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.float32 and not any(re.search(one, name) for one in kept):
            parameter.data = parameter.data.to(dtype)
