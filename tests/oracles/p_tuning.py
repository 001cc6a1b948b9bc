"""P-tuning (arXiv 2103.10385) with a perceptron of two hidden layers: [P; E(x)], P made row by row."""

import numpy as np


def oracle(x, W, b, p, method, context):
    P = []
    for e in p["E"]:
        z = np.maximum(p["W1"] @ e + p["b1"], 0)
        z = np.maximum(p["W2"] @ z + p["b2"], 0)
        P.append(p["W3"] @ z + p["b3"])
    texts = [[W[:, int(np.argmax(token))] for token in sequence[len(P) :]] for sequence in x]
    return np.array([[*P, *text] for text in texts])
