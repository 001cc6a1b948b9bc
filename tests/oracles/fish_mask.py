"""FISH mask (arXiv 2111.09839): theta + mask * offset, the mask being ones at the chosen positions."""

import numpy as np


def oracle(x, W, b, p, method, context):
    edited = W.copy()
    for position, offset in zip(p["index"], p["value"], strict=True):
        row, column = divmod(int(position), W.shape[1])
        edited[row, column] += offset
    y = np.einsum("...i,oi->...o", x, edited)
    return y if b is None else y + b
