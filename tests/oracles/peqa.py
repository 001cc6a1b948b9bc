"""PEQA (arXiv 2305.14152, section 3.2): W' = (s + Ds) * integers, a scale for each output or group of its inputs."""

import numpy as np


def oracle(x, W, b, p, method, context):
    size = method.group_size or W.shape[1]
    scaled = np.empty_like(W)
    for out in range(W.shape[0]):
        for column in range(W.shape[1]):
            scaled[out, column] = p["g"][out, column // size] * W[out, column]
    y = np.einsum("...i,oi->...o", x, scaled)
    return y if b is None else y + b
