"""Trained rows of an embedding E = W^T: the vector of token t is V_k where t is the k-th chosen id, else E_t."""

import numpy as np


def oracle(x, W, b, p, method, context):
    table = [W[:, token] for token in range(W.shape[1])]
    for k, token in enumerate(p["index"]):
        table[int(token)] = p["V"][k]
    return np.stack(table)[np.argmax(x, axis=-1)]
