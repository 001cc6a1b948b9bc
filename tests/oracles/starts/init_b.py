"""Init[B] (arXiv 2406.08447): A = 0 and B uniform on ±1/sqrt(rank)."""

import numpy as np


def oracle(W, rank, scale, measured, store, start, begun):
    assert np.abs(begun["B"]).max() <= 1 / np.sqrt(rank)
    assert begun["B"].std() > 0.4 / np.sqrt(rank)
    return np.zeros_like(W), np.zeros_like(W)
