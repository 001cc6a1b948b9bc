"""LoRA-GA (arXiv 2407.05000, section 3.3 and algorithm 1): A from the first r right, B from the next r left singular
vectors of the gradient, both times d_out^(1/4) / sqrt(gamma); W is reduced by s B A."""

import numpy as np


def oracle(W, rank, scale, measured, store, start, begun):
    U, _, Vt = np.linalg.svd(measured["gradient"], full_matrices=False)
    size = len(W) ** 0.25 / np.sqrt(start.gamma)
    A, B = size * Vt[:rank], size * U[:, rank : 2 * rank]
    signs = np.sign(np.sum(A * begun["A"], 1)), np.sign(np.sum(B * begun["B"], 0))
    np.testing.assert_allclose(begun["A"], signs[0][:, None] * A, atol=1e-6)
    np.testing.assert_allclose(begun["B"], signs[1] * B, atol=1e-6)
    product = scale * begun["B"] @ begun["A"]
    return product, product
