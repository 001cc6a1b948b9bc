"""Adafactor (arXiv 1804.04235, algorithms 4 and 5), steps not relative to the weight."""

import numpy as np


def oracle(gradients, weights, rule):
    shape = gradients[0].shape
    rows, columns = np.zeros(shape[:1]), np.zeros(shape[1:])
    everything, first = np.zeros(shape), np.zeros(shape)
    for step, g in enumerate(gradients, 1):
        beta = 1 - step ** (-rule.power)
        square = g * g + 1e-30
        if len(shape) == 2:
            rows = beta * rows + (1 - beta) * square.sum(1)
            columns = beta * columns + (1 - beta) * square.sum(0)
            estimate = np.outer(rows, columns) / rows.sum()
        else:
            everything = beta * everything + (1 - beta) * square
            estimate = everything
        u = g / np.sqrt(estimate)
        u = u / max(1.0, np.sqrt(np.mean(u**2)) / rule.threshold)
        first = rule.beta1 * first + (1 - rule.beta1) * u
        yield first.copy()
