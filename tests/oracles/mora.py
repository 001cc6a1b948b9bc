"""MoRA (arXiv 2405.12130): pieces of x are turned by their position, then times M."""

import numpy as np


def oracle(x, W, b, p, method, context):
    M = p["M"]
    size, out = len(M), W.shape[0]
    pieces = int(np.ceil(x.shape[-1] / size))
    filled = x[..., np.arange(pieces * size) % x.shape[-1]]
    done = []
    for position in range(pieces):
        piece = filled[..., position * size : (position + 1) * size]
        turned = np.empty_like(piece)
        for j in range(size // 2):
            angle = position / 10000 ** (2 * j / size)
            u, v = piece[..., j], piece[..., j + size // 2]
            turned[..., j] = u * np.cos(angle) - v * np.sin(angle)
            turned[..., j + size // 2] = v * np.cos(angle) + u * np.sin(angle)
        done.append(np.einsum("...i,oi->...o", turned, M))
    update = np.concatenate(done, -1)
    update = update[..., np.arange(out) % update.shape[-1]]
    y = np.einsum("...i,oi->...o", x, W) + update
    return y if b is None else y + b
