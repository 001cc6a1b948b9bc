"""AdapterDrop (arXiv 2010.11918) outside training: its adapters, here Houlsby's, h + U gelu(D h + d) + u, all run."""

from math import erf, sqrt

import numpy as np


def oracle(x, W, b, p, method, context):
    h, p = context["h"], p["inner"]
    low = h @ p["D"].T + p["d"]
    normal = np.array([0.5 * (1.0 + erf(t / sqrt(2.0))) for t in low.ravel()]).reshape(low.shape)
    return h + (low * normal) @ p["U"].T + p["u"]
