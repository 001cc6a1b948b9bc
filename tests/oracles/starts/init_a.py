"""Init[A] (arXiv 2106.09685): B = 0 and A uniform on ±1/sqrt(in); nothing is taken out."""

import numpy as np


def oracle(W, rank, scale, measured, store, start, begun):
    assert np.abs(begun["A"]).max() <= 1 / np.sqrt(W.shape[1])
    assert begun["A"].std() > 0.4 / np.sqrt(W.shape[1])
    return np.zeros_like(W), np.zeros_like(W)
