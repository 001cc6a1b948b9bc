"""LQ-LoRA (arXiv 2311.12023, algorithms 1 and 2, section 3.3): Fisher-weighted low rank by row and column means, then
quantize what is left; stop when the weighted error rises."""

import numpy as np


def oracle(W, rank, scale, measured, store, start, begun):
    F = measured["fisher"]
    rows, columns = np.diag(np.sqrt(F.mean(1))), np.diag(np.sqrt(F.mean(0)))
    Q, errors, products = np.zeros_like(W), [], []
    for _ in range(start.rounds):
        U, S, Vt = np.linalg.svd(rows @ (W - Q) @ columns, full_matrices=False)
        low = np.linalg.inv(rows) @ (U[:, :rank] * S[:rank]) @ Vt[:rank] @ np.linalg.inv(columns)
        Q = store(W - low)
        errors.append(np.sqrt(np.sum(F * (W - Q - low) ** 2)))
        products.append(low)
        if len(errors) > 1 and errors[-1] >= errors[-2]:
            break
    best = products[int(np.argmin(errors))]
    return best, best
