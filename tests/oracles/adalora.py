"""AdaLoRA (arXiv 2303.10512): W = W0 + P Λ Q, scaled by alpha / r of the first rank as in the official code."""

import numpy as np


def oracle(x, W, b, p, method, context):
    update = p["P"] @ np.diag(p["lambda_"]) @ p["Q"]
    y = np.einsum("...i,oi->...o", x, W + method.alpha / method.rank * update)
    return y if b is None else y + b
