"""PreLayer (arXiv 2106.09685, section 5.1): activations of the prefix tokens are replaced by trained ones."""

import numpy as np


def oracle(x, W, b, p, method, context):
    h = np.array(context["h"])
    for row in range(len(h)):
        for place in range(method.length):
            h[row, place] = p["P"][place]
    return h
