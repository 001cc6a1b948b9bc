"""LoftQ (arXiv 2310.08659, algorithm 1): for t = 1..T: Q_t = q(W - B A), then B A = SVD_r(W - Q_t)."""

import numpy as np


def oracle(W, rank, scale, measured, store, start, begun):
    product = np.zeros_like(W)
    for _ in range(start.rounds):
        before = product
        U, S, Vt = np.linalg.svd(W - store(W - product), full_matrices=False)
        product = (U[:, :rank] * S[:rank]) @ Vt[:rank]
    return product, before
