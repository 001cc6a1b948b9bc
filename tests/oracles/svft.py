"""SVFT (arXiv 2405.19597, eq. 2): W' = U (Σ + M) Vᵀ with the singular value decomposition W = U Σ Vᵀ."""

import numpy as np


def oracle(x, W, b, p, method, context):
    U, V = p["U"], p["V"]
    n = U.shape[1]
    singular = np.linalg.svd(W, compute_uv=False)
    assert np.allclose(U @ np.diag(singular) @ V.T, W, atol=1e-4 * singular[0]), "U Σ Vᵀ is not W"
    M = np.zeros((n, n))
    for place, value in zip(p["index"], p["m"], strict=True):
        i, j = divmod(int(place), n)
        assert method.pattern in ("random", "top") or abs(i - j) <= (0 if method.pattern == "plain" else method.width)
        M[i, j] = value
    y = np.einsum("...i,oi->...o", x, W + U @ M @ V.T)
    return y if b is None else y + b
