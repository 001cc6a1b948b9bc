"""DiReFT (arXiv 2404.03592, eq. 3): h + W2^T (W1 h + b) at the first and last positions of the prompt.

Row by row, position by position.
"""

import numpy as np


def edited(is_prompt, first, last):
    """The places of a row's edited tokens: min(first, n // 2) in front, min(last, ceil(n / 2)) behind."""
    places = np.flatnonzero(is_prompt)
    n = len(places)
    front, back = min(first, n // 2), min(last, int(np.ceil(n / 2)))
    return [*places[:front], *places[n - back :]]


def oracle(x, W, b, p, method, context):
    h, prompt = context["h"], context["prompt"]
    y = h.copy()
    for row in range(h.shape[0]):
        is_prompt = np.ones(h.shape[1]) if prompt is None else prompt[row]
        for place in edited(is_prompt, method.first, method.last):
            low = [float(np.dot(p["W1"][k], h[row, place]) + p["b"][k]) for k in range(method.rank)]
            for k in range(method.rank):
                y[row, place] = y[row, place] + low[k] * p["W2"][k]
    return y
