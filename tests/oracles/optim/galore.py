"""GaLore with Adam inside (arXiv 2403.03507, algorithm 2): project the smaller side, step there, project back."""

import numpy as np


def oracle(gradients, weights, rule):
    shape = gradients[0].shape
    projected = len(shape) == 2 and min(shape) >= rule.rank
    first = second = 0.0
    basis = None
    for t, g in enumerate(gradients):
        r = g
        if projected:
            tall = shape[0] >= shape[1]
            if t % rule.gap == 0:
                u, _, vt = np.linalg.svd(g)
                basis = vt.T[:, : rule.rank] if tall else u[:, : rule.rank]
            r = g @ basis if tall else basis.T @ g
        first = 0.9 * first + 0.1 * r
        second = 0.999 * second + 0.001 * r**2
        n = first / (1 - 0.9 ** (t + 1)) / (np.sqrt(second / (1 - 0.999 ** (t + 1))) + 1e-8)
        if projected:
            n = rule.scale * (n @ basis.T if tall else basis @ n)
        yield n
