"""Delta-LoRA (arXiv 2309.02411): y = W_t x + s B A x, W_t = W_0 + share s (B A - B_K A_K), K the end of the warmup."""

import numpy as np


def oracle(x, W, b, p, method, context):
    s = method.alpha / method.rank
    low = p["B"] @ p["A"]
    moved = W + method.share * s * (low - p["B_K"] @ p["A_K"])
    y = np.einsum("...i,oi->...o", x, moved) + s * np.einsum("...i,oi->...o", x, low)
    return y if b is None else y + b
