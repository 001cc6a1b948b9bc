"""Gradient descent with (heavy ball) momentum, as torch defines it."""

import numpy as np


def oracle(gradients, weights, rule):
    velocity = np.zeros_like(gradients[0])
    for g in gradients:
        velocity = rule.momentum * velocity + g
        yield velocity.copy()
