"""Structured diff pruning (arXiv 2012.07463, section 3.3): theta + z_group * z * w, one group gate per matrix."""

import numpy as np


def hard_concrete(noise, log_alpha):
    return np.clip(3.0 / (1.0 + np.exp(-noise - log_alpha)) - 1.5, 0.0, 1.0)


def oracle(x, W, b, p, method, context):
    group = hard_concrete(p["group_noise"].item(), 5.0 + method.gate_speed * p["group_gate"].item())
    each = hard_concrete(p["noise"], 5.0 + method.gate_speed * p["gate"])
    y = np.einsum("...i,oi->...o", x, W + group * each * p["value"])
    return y if b is None else y + b
