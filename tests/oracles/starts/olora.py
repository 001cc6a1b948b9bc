"""OLoRA (arXiv 2406.01775, algorithm 1): W = Q R, B = Q[:, :r], A = R[:r]; W is reduced by s B A."""

import numpy as np


def oracle(W, rank, scale, measured, store, start, begun):
    Q = np.zeros((W.shape[0], rank))
    for k in range(rank):
        q = W[:, k] - Q @ (Q.T @ W[:, k])
        q = q - Q @ (Q.T @ q)
        Q[:, k] = q / np.linalg.norm(q)
    np.testing.assert_allclose(begun["B"], Q, atol=1e-9)
    np.testing.assert_allclose(begun["A"], Q.T @ W, atol=1e-9)
    return scale * Q @ Q.T @ W, scale * Q @ Q.T @ W
