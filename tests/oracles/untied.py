"""Untied LoReFT (arXiv 2404.03592): h + R^T (W h + b - R h), one (R, W, b) for the first positions of the prompt and
another for the last.

R's rows are an orthonormal basis of the rows of the trained M, by the Cholesky factor of its Gram matrix.
"""

import numpy as np


def loreft(v, p):
    R = np.linalg.solve(np.linalg.cholesky(p["M"] @ p["M"].T), p["M"])
    return v + R.T @ (p["W"] @ v + p["b"] - R @ v)


def oracle(x, W, b, p, method, context):
    h, prompt = context["h"], context["prompt"]
    y = h.copy()
    for row in range(h.shape[0]):
        places = np.flatnonzero(np.ones(h.shape[1]) if prompt is None else prompt[row])
        n = len(places)
        for rank, place in enumerate(places):
            if rank < min(method.inner.first, n // 2):
                y[row, place] = loreft(h[row, place], p["first"])
            elif n - rank <= min(method.inner.last, int(np.ceil(n / 2))):
                y[row, place] = loreft(h[row, place], p["last"])
    return y
