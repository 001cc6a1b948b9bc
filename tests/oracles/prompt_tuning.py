"""Prompt tuning (arXiv 2104.08691): the model reads [P; E(x)]. The first `length` one-hot rows stand for the prompt."""

import numpy as np


def oracle(x, W, b, p, method, context):
    rows = []
    for sequence in x:
        looked_up = [W[:, int(np.argmax(token))] for token in sequence[method.length :]]
        rows.append(np.concatenate([p["P"], np.stack(looked_up)]))
    return np.stack(rows)
