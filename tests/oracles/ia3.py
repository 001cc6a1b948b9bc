"""IA3 (arXiv 2205.05638, section 3.3): k and v times l, and (l_ff * gamma(W1 x)) W2: the input of `down` is rescaled.

Keys and values are what the projection puts out, bias included.
"""

import numpy as np


def oracle(x, W, b, p, method, context):
    down = context["role"] == "down"
    if down:
        x = x * p["l_in"]
    y = np.einsum("...i,oi->...o", x, W)
    if b is not None:
        y = y + b
    return y if down else y * p["l"]
