"""AdaLomo (arXiv 2310.10195, algorithm 1), with the decay of Adafactor for its second moment."""

import numpy as np


def rms(x):
    return np.sqrt((x * x).sum() / x.size)


def oracle(gradients, weights, rule):
    r = c = v = 0.0
    for t, (g, theta) in enumerate(zip(gradients, weights, strict=True), 1):
        beta = 1 - t**-rule.power
        if g.ndim == 2:
            r = beta * r + (1 - beta) * (g**2 + 1e-30).mean(axis=1)
            c = beta * c + (1 - beta) * (g**2 + 1e-30).mean(axis=0)
            v = r[:, None] * c[None, :] / r.mean()
        else:
            v = beta * v + (1 - beta) * (g**2 + 1e-30)
        u = g / np.sqrt(v)
        yield u / max(1.0, rms(u) / rule.threshold) * max(rule.smallest, rms(theta))
