"""HRA (arXiv 2405.17484, eq. 3): W' = W ∏ (I − 2 u uᵀ / ‖u‖²), the reflections built one by one and multiplied."""

import numpy as np


def oracle(x, W, b, p, method, context):
    for u in p["U"].T:
        W = W @ (np.eye(len(u)) - 2 * np.outer(u, u) / (u @ u))
    y = np.einsum("...i,oi->...o", x, W)
    return y if b is None else y + b
