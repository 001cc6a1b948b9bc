"""Lin adapter (arXiv 2004.03829, section 3): x + W_u relu(W_d LN(x)), position by position, the layer norm its own."""

import numpy as np


def normed(v, gain, offset):
    centered = v - v.mean()
    return gain * centered / np.sqrt(np.mean(centered * centered) + 1e-5) + offset


def oracle(x, W, b, p, method, context):
    h = context["h"]
    rows = h.reshape(-1, h.shape[-1])
    out = np.empty_like(rows)
    for i, v in enumerate(rows):
        low = p["D"] @ normed(v, p["gamma"], p["beta"]) + p["d"]
        out[i] = v + p["U"] @ np.where(low > 0, low, 0.0) + p["u"]
    return out.reshape(h.shape)
