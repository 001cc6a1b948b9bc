"""ScaleLoRA (PERP, arXiv 2312.15230): every entry of W times that of B A."""

import numpy as np


def oracle(x, W, b, p, method, context):
    y = np.einsum("...i,oi,or,ri->...o", x, W, p["B"], p["A"])
    return y if b is None else y + b
