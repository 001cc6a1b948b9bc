"""SSF (arXiv 2210.08823, eq. 2): y = γ ∘ x + β on what the layer puts out."""

import numpy as np


def oracle(x, W, b, p, method, context):
    if context["kind"] == "norm":
        centre = np.mean(x, axis=-1, keepdims=True) if context["centered"] else 0.0
        spread = np.mean((x - centre) ** 2, axis=-1, keepdims=True)
        y = (x - centre) / np.sqrt(spread + context["eps"]) * W[:, 0]
    else:
        y = np.einsum("...i,oi->...o", x, W)
    if b is not None:
        y = y + b
    return p["gamma"] * y + p.get("beta", 0.0)
