"""LoRA-XS (arXiv 2405.17604): h = W x + (alpha / r) A R B x with A B the truncated SVD of W."""

import numpy as np


def oracle(x, W, b, p, method, context):
    A, B = p["A"], p["B"]
    singular = np.linalg.svd(W, compute_uv=False)[: method.rank]
    assert np.allclose(A.T @ A, np.diag(singular**2), atol=1e-4 * singular[0] ** 2), "A is not U Σ"
    assert np.allclose(B @ B.T, np.eye(method.rank), atol=1e-4), "B is not orthonormal"
    low = np.einsum("...i,ri->...r", x, B)
    y = np.einsum("...i,oi->...o", x, W)
    y = y + method.alpha / method.rank * np.einsum("...r,qr,oq->...o", low, p["R"], A)
    return y if b is None else y + b
