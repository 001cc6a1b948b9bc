"""Lion (arXiv 2302.06675, program 1)."""

import numpy as np


def oracle(gradients, weights, rule):
    m = np.zeros_like(gradients[0])
    for g in gradients:
        yield np.sign(rule.beta1 * m + (1 - rule.beta1) * g)
        m = rule.beta2 * m + (1 - rule.beta2) * g
