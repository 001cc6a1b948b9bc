"""C3A (arXiv 2407.19342): blocks of circulant matrices; y_k = Σ_n x_n w_{n−k}, over the number of inputs."""

import numpy as np


def oracle(x, W, b, p, method, context):
    size = method.block_size
    update = np.zeros(W.shape)
    for o, row in enumerate(p["w"]):
        for i, w in enumerate(row):
            for k in range(size):
                for n in range(size):
                    update[o * size + k, i * size + n] = w[(n - k) % size]
    y = np.einsum("...i,oi->...o", x, W + update / W.shape[1])
    return y if b is None else y + b
