"""FISH-DIP (arXiv 2311.03748): theta plus what the present mask and all earlier ones have moved."""

import numpy as np


def oracle(x, W, b, p, method, context):
    moved = np.zeros(W.size)
    for places, offsets in ((p["index"], p["value"]), (p["kept_index"], p["kept_value"])):
        for place, offset in zip(places, offsets, strict=True):
            assert moved[place] == 0.0
            moved[place] = offset
    y = x @ (W + moved.reshape(W.shape)).T
    return y if b is None else y + b
