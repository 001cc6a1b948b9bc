"""FourierFT (arXiv 2405.03003, eq. 2 to 4): ΔW = α·Re of the inverse discrete Fourier transform of a sparse F."""

import numpy as np


def oracle(x, W, b, p, method, context):
    out, into = W.shape
    update = np.zeros((out, into))
    for place, c in zip(p["shared"][f"places_{out}_{into}"], p["c"], strict=True):
        u, v = divmod(int(place), into)
        angle = 2 * np.pi * (u * np.arange(out)[:, None] / out + v * np.arange(into) / into)
        update += c * np.cos(angle) / (out * into)
    y = np.einsum("...i,oi->...o", x, W + method.alpha * update)
    return y if b is None else y + b
