"""BitFit (arXiv 2106.10199): only b moves; y = W x + (b + d), and for a norm y = gamma * normalize(x) + (beta + d)."""

import numpy as np


def oracle(x, W, b, p, method, context):
    assert b is not None
    if context["kind"] == "norm":
        x = x - x.mean(-1, keepdims=True) if context["centered"] else x
        y = W[:, 0] * x / np.sqrt((x**2).mean(-1, keepdims=True) + context["eps"])
    else:
        y = np.einsum("...i,oi->...o", x, W)
    return y + b + p["d"]
