"""SHiRA (arXiv 2406.13175, section 3): W' = W + S with S zero but for the chosen entries."""

import numpy as np


def oracle(x, W, b, p, method, context):
    new = W.copy()
    for place, value in zip(p["index"], p["value"], strict=True):
        new[divmod(int(place), W.shape[1])] += value
    y = np.einsum("...i,oi->...o", x, new)
    return y if b is None else y + b
