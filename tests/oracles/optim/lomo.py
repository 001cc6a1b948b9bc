"""Gradient descent (arXiv 2306.09782, algorithm 1)."""


def oracle(gradients, weights, rule):
    yield from gradients
