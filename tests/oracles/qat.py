"""Quantization-aware training: every row (or group of it) of V on 2^bits values from its min to its max."""

import numpy as np


def oracle(x, W, b, p, method, context):
    V = p["V"]
    size = method.group_size or V.shape[1]
    rounded = np.empty_like(V)
    for row in range(V.shape[0]):
        for start in range(0, V.shape[1], size):
            v = V[row, start : start + size]
            s = (v.max() - v.min()) / (2**method.code_bits - 1)
            rounded[row, start : start + size] = np.rint((v - v.min()) / s) * s + v.min()
    y = np.einsum("...i,oi->...o", x, rounded)
    return y if b is None else y + p["c"]
