"""PiSSA (arXiv 2404.02948, eqs. 2-4): the principal r triplets train, W_res = the rest; QPiSSA (algorithm 1) repeats on
W - nf4(W_res). A and B each carry the square root of the singular values."""

import numpy as np


def principal(M, rank):
    values, vectors = np.linalg.eigh(M.T @ M)
    V = vectors[:, np.argsort(values)[::-1][:rank]]
    return M @ V @ V.T


def oracle(W, rank, scale, measured, store, start, begun):
    product = principal(W, rank)
    for _ in range(start.rounds - 1 if store is not None else 0):
        product = principal(W - store(W - product), rank)
    singular = np.linalg.svd(product)[1][:rank]
    np.testing.assert_allclose((begun["A"] ** 2).sum(1), singular / scale, rtol=1e-6)
    np.testing.assert_allclose((begun["B"] ** 2).sum(0), singular / scale, rtol=1e-6)
    return product, product
