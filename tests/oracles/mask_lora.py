"""MaskLoRA (PERP, arXiv 2312.15230): W + (alpha / r) B A, only where W is not zero."""

import numpy as np


def oracle(x, W, b, p, method, context):
    mask = np.where(W == 0.0, 0.0, 1.0)
    new = W + method.alpha / method.rank * mask * np.einsum("or,ri->oi", p["B"], p["A"])
    y = np.einsum("...i,oi->...o", x, new)
    return y if b is None else y + b
