"""What other tools write, packed in NumPy from their descriptions alone, and what it stands for in float64."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

QUANTILES = "-1 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334"
QUANTILES += " -0.09105003625154495 0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224"
QUANTILES += " 0.44070982933044434 0.5626170039176941 0.7229568362236023 1"
NF4 = np.array(QUANTILES.split(), dtype=np.float32)
HALF = [0.0, 0.0052083333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25]
FP4 = np.array(HALF + [-value for value in HALF], dtype=np.float32)


def dynamic_levels() -> np.ndarray:
    """The 256 signed levels of bitsandbytes' dynamic map."""
    found = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2**decade + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        found += [*middles, *-middles]
    return np.array(sorted(found), dtype=np.float32)


def four_bits(
    draw: np.random.Generator, out: int, into: int, kind: str, block: int, double: bool
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(tensors by the end of their names, W) of random codes and scales."""
    levels, count = (NF4 if kind == "nf4" else FP4), out * into
    codes = draw.integers(0, 16, count).astype(np.uint8)
    even = np.append(codes, np.uint8(0)) if count % 2 else codes
    blocks = -(-count // block)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "float32", "shape": [out, into]}
    tensors = {"weight": (even[::2] * 16 + even[1::2])[:, None], "weight.quant_map": levels}
    if double:
        table, outer = dynamic_levels(), -(-blocks // 256)
        inner = draw.integers(0, 256, blocks).astype(np.uint8)
        nested = draw.uniform(0.001, 0.01, outer).astype(np.float32)
        offset = float(np.float32(0.05))
        scales = table[inner].astype(np.float64) * np.repeat(nested, 256)[:blocks].astype(np.float64) + offset
        tensors |= {"weight.absmax": inner, "weight.nested_absmax": nested, "weight.nested_quant_map": table}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    else:
        absmax = draw.uniform(0.01, 0.3, blocks).astype(np.float32)
        scales = absmax.astype(np.float64)
        tensors["weight.absmax"] = absmax
    text = json.dumps(state).encode()
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = np.frombuffer(text, dtype=np.uint8).copy()
    W = levels[codes].astype(np.float64) * np.repeat(scales, block)[:count]
    return tensors, W.reshape(out, into)


def eight_bits(draw: np.random.Generator, out: int, into: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The same of LLM.int8()."""
    codes = draw.integers(-127, 128, (out, into)).astype(np.int8)
    scale = draw.uniform(0.05, 0.3, out).astype(np.float32)
    tensors = {"weight": codes, "SCB": scale, "weight_format": np.array(0, dtype=np.uint8)}
    return tensors, codes.astype(np.float64) * scale[:, None].astype(np.float64) / 127


def word_stream(values: np.ndarray, bits: int) -> np.ndarray:
    """(count, columns) numbers as 32-bit words (words, columns): a Python integer per column, lowest number first."""
    words = -(-len(values) * bits // 32)
    made = np.zeros((words, values.shape[1]), dtype=np.uint32)
    for column in range(values.shape[1]):
        whole = sum(int(value) << (bits * place) for place, value in enumerate(values[:, column]))
        for word in range(words):
            made[word, column] = whole >> (32 * word) & 0xFFFFFFFF
    return made.view(np.int32)


def gptq(
    draw: np.random.Generator, out: int, into: int, bits: int, group: int, order: str, version: str = "gptq"
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The same of GPTQ. `order`: plain, or desc_act with groups of columns that lie apart."""
    size = into if group < 1 else group
    groups = -(-into // size)
    g_idx = np.arange(into) // size
    if order == "desc_act":
        g_idx = g_idx[draw.permutation(into)]
    codes = draw.integers(0, 2**bits, (into, out))
    zeros = draw.integers(0, 2**bits, (groups, out))
    scales = draw.uniform(0.005, 0.03, (groups, out)).astype(np.float16)
    stored = (zeros - 1) % 2**bits if version == "gptq" else zeros
    tensors = {
        "qweight": word_stream(codes, bits),
        "qzeros": word_stream(stored.T, bits).T.copy(),
        "scales": scales,
        "g_idx": g_idx.astype(np.int32),
    }
    return tensors, (scales.astype(np.float64)[g_idx] * (codes - zeros[g_idx])).T
