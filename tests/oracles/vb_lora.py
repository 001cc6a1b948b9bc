"""VB-LoRA (arXiv 2405.15179): every sub-vector of A and B is a top-k softmax mixture of the bank."""

import numpy as np


def mixture(logits, bank, k):
    top = np.argsort(-logits)[:k]
    weights = np.exp(logits[top] - logits[top].max())
    return (weights / weights.sum()) @ bank[top]


def oracle(x, W, b, p, method, context):
    bank, k = p["shared"]["bank"], method.k
    A = np.stack([np.concatenate([mixture(piece, bank, k) for piece in row]) for row in p["a"]])
    columns = [np.concatenate([mixture(one[r], bank, k) for one in p["b"]]) for r in range(method.rank)]
    B = np.stack(columns, axis=1)
    y = np.einsum("...i,oi->...o", x, W + B[: W.shape[0]] @ A[:, : W.shape[1]])
    return y if b is None else y + b
