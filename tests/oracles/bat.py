"""Bat (arXiv 2409.15371): every block of W becomes W_oi + W_oi D_o + D_o."""

import numpy as np


def oracle(x, W, b, p, method, context):
    size, new = method.block_size, W.copy()
    for o in range(W.shape[0] // size):
        for i in range(W.shape[1] // size):
            at = (slice(o * size, (o + 1) * size), slice(i * size, (i + 1) * size))
            new[at] = W[at] + W[at] @ p["D"][o] + p["D"][o]
    y = np.einsum("...i,oi->...o", x, new)
    return y if b is None else y + b
