"""EVA (arXiv 2410.07170, section 3.2): A = the first r right singular vectors of the layer's inputs, B = 0."""

import numpy as np


def oracle(W, rank, scale, measured, store, start, begun):
    _, _, Vt = np.linalg.svd(measured["X"], full_matrices=False)
    V = Vt[:rank].T
    np.testing.assert_allclose(begun["A"].T @ begun["A"], V @ V.T, atol=1e-6)
    np.testing.assert_allclose(np.abs(np.diag(begun["A"] @ V)), 1, atol=1e-6)
    return np.zeros_like(W), np.zeros_like(W)
