"""LoReFT (arXiv 2404.03592, eq. 2): h + R^T (W h + b - R h) at the first and last positions of the prompt.

R's rows are an orthonormal basis of the rows of the trained M, by Gram and Schmidt. Row by row, position by position.
"""

import numpy as np


def gram_schmidt(M):
    rows = []
    for v in M:
        for q in rows:
            v = v - np.dot(q, v) * q
        for q in rows:
            v = v - np.dot(q, v) * q
        rows.append(v / np.sqrt(np.dot(v, v)))
    return np.stack(rows)


def positions(real, first, last):
    """Which real positions are edited: min(first, n // 2) at the front, min(last, ceil(n / 2)) behind."""
    places = [place for place, is_real in enumerate(real) if is_real]
    n = len(places)
    front = min(first, n // 2)
    back = min(last, (n + 1) // 2)
    return set(places[:front]) | set(places[n - back :])


def oracle(x, W, b, p, method, context):
    h = context["h"]
    R = gram_schmidt(p["M"])
    prompt = np.ones(h.shape[:2]) if context["prompt"] is None else context["prompt"]
    y = h.copy()
    for row in range(h.shape[0]):
        for place in positions(prompt[row], method.first, method.last):
            v = h[row, place]
            y[row, place] = v + R.T @ (p["W"] @ v + p["b"] - R @ v)
    return y
