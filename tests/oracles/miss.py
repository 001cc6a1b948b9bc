"""MiSS (arXiv 2409.15371): the update repeats one (out, r) matrix along the input, here entry by entry."""

import numpy as np


def oracle(x, W, b, p, method, context):
    out, into = W.shape
    D = p["D"]
    update = np.array([[D[j % method.rank, i % D.shape[1]] for j in range(into)] for i in range(out)])
    y = np.einsum("...i,oi->...o", x, W + update)
    return y if b is None else y + b
