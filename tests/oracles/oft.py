"""OFT (arXiv 2306.07280, eq. 2 and 3): zᵀ = xᵀ R W₀ with W₀ (in, out) and R block-diagonal, R = (I + Q)(I − Q)⁻¹."""

import numpy as np


def oracle(x, W, b, p, method, context):
    size = method.block_size
    R = np.zeros((W.shape[1], W.shape[1]))
    for block, q in enumerate(p["q"]):
        Q = np.zeros((size, size))
        place = 0
        for row in range(size):
            for column in range(row + 1, size):
                Q[row, column], Q[column, row] = q[place], -q[place]
                place += 1
        at = slice(block * size, (block + 1) * size)
        R[at, at] = (np.eye(size) + Q) @ np.linalg.inv(np.eye(size) - Q)
    assert np.allclose(R @ R.T, np.eye(len(R)))
    y = np.einsum("...i,io->...o", x, R @ W.T)
    return y if b is None else y + b
