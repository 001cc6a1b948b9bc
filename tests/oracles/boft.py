"""BOFT (arXiv 2311.06243, section 4): R = G_m … G_1, each factor a permuted block-diagonal rotation, built densely."""

import numpy as np


def oracle(x, W, b, p, method, context):
    size, into = method.block_size, W.shape[1]
    half = size // 2
    R = np.eye(into)
    for index, blocks in enumerate(p["D"]):
        inner = np.zeros((into, into))
        for place, D in enumerate(blocks):
            S = (D - D.T) / 2
            at = slice(place * size, (place + 1) * size)
            inner[at, at] = (np.eye(size) - S) @ np.linalg.inv(np.eye(size) + S)
        order = []  # the input at each position of the block-diagonal matrix: a butterfly's two wings are 2^index apart
        run = size * 2**index
        for start in range(0, into, run):
            chunks = [list(range(start + at, start + at + half)) for at in range(0, run, half)]
            order += [one for near in range(2**index) for chunk in chunks[near :: 2**index] for one in chunk]
        P = np.eye(into)[:, order]
        R = P @ inner @ P.T @ R
    assert np.allclose(R @ R.T, np.eye(into))
    y = p["s"] * np.einsum("...i,io->...o", x, R @ W.T)
    return y if b is None else y + b
