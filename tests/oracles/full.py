"""Full fine-tuning of one layer: its own weight V and bias c stand where W and b stood."""

import numpy as np


def oracle(x, W, b, p, method, context):
    V, c = p["V"], p.get("c")
    if context["kind"] == "norm":
        x = x - np.mean(x, axis=-1, keepdims=True) if context["centered"] else x
        y = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + context["eps"]) * V[:, 0]
    else:
        y = np.einsum("...i,oi->...o", x, V)
    return y if c is None else y + c
