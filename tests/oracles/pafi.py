"""PaFi (arXiv 2305.16742): theta plus offsets at the places of smallest magnitude, checked to be just those."""

import numpy as np


def oracle(x, W, b, p, method, context):
    where, offsets = p["index"].astype(int), p["value"]
    others = np.delete(np.abs(W).reshape(-1), where)
    if where.size and others.size:
        assert np.abs(W).reshape(-1)[where].max() <= others[others > 0].min()
    flat = np.zeros(W.size)
    flat[where] = offsets
    y = x @ (W + flat.reshape(W.shape)).T
    return y if b is None else y + b
