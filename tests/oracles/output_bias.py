"""BitFit's equation (arXiv 2106.10199) for one layer: y = W x + (b + d), with b = 0 where there is no bias."""

import numpy as np


def oracle(x, W, b, p, method, context):
    total = p["d"] if b is None else b + p["d"]
    return np.einsum("...i,oi->...o", x, W) + total
