"""Compacter (arXiv 2106.04647, eq. 4 and 5): h + gelu(h H_down + b) H_up + b', H = sum_i A_i (x) (s_i t_i), rows first.

GELU is the exact one, x Phi(x).
"""

from math import erf, sqrt

import numpy as np


def matrix(A, p):
    return sum(np.kron(A[i], p["S"][i] @ p["T"][i]) for i in range(len(A)))


def oracle(x, W, b, p, method, context):
    h, A = context["h"], p["shared"]["A"]
    low = h @ matrix(A, p["down"]) + p["down"]["b"]
    gelu = np.vectorize(lambda t: t * 0.5 * (1.0 + erf(t / sqrt(2.0))))
    return h + gelu(low) @ matrix(A, p["up"]) + p["up"]["b"]
