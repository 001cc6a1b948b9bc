"""Houlsby adapter (arXiv 1902.00751, figure 2 and the official code): h + U gelu(D h + d) + u on a sub-layer's output.

GELU is the exact one, x Phi(x).
"""

from math import erf, sqrt

import numpy as np

phi = np.vectorize(lambda t: 0.5 * (1.0 + erf(t / sqrt(2.0))))


def oracle(x, W, b, p, method, context):
    h = context["h"]
    inner = np.einsum("...i,mi->...m", h, p["D"]) + p["d"]
    return h + np.einsum("...m,om->...o", inner * phi(inner), p["U"]) + p["u"]
