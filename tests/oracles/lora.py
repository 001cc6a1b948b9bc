"""LoRA (arXiv 2106.09685, section 4.1): h = W0 x + s B A x, s = alpha / r; in rsLoRA alpha / sqrt(r).

With a start that takes a product out of the pretrained weight (PiSSA, arXiv 2404.02948, eq. 5): h = W_res x + s B A x,
W_res = W0 - s B0 A0.
"""

import numpy as np


def oracle(x, W, b, p, method, context):
    scaling = p.get("alpha", method.alpha) / len(p["A"]) ** method.rank_power
    low = np.einsum("...i,ri->...r", x, p["A"])
    residual = W - scaling * p["B0"] @ p["A0"] if "A0" in p else W
    y = np.einsum("...i,oi->...o", x, residual) + scaling * np.einsum("...r,or->...o", low, p["B"])
    return y if b is None else y + b
