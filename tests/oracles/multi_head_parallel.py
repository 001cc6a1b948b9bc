"""Multi-head parallel adapter (arXiv 2110.04366, section 4.4): head_i + relu(x W_q^(i) P_k^T) P_v, before W_o."""

import numpy as np


def oracle(x, W, b, p, method, context):
    q = context["sources"].get("q", x)
    heads, _, size = p["K"].shape
    joined = x.copy()
    for i in range(heads):
        mine = slice(i * size, (i + 1) * size)
        weights = np.maximum(q[..., mine] @ p["K"][i].T, 0.0)
        joined[..., mine] += weights @ p["V"][i]
    y = joined @ W.T
    return y if b is None else y + b
