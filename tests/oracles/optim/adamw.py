"""Adam (arXiv 1412.6980, algorithm 1): returns the sequence of steps before the learning rate."""

import numpy as np


def oracle(gradients, weights, rule):
    first = second = np.zeros_like(gradients[0])
    for step, g in enumerate(gradients, 1):
        first = rule.beta1 * first + (1 - rule.beta1) * g
        second = rule.beta2 * second + (1 - rule.beta2) * g**2
        corrected = second / (1 - rule.beta2**step)
        yield first / (1 - rule.beta1**step) / (np.sqrt(corrected) + rule.epsilon)
