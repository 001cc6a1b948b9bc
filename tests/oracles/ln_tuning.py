"""LN-tuning (arXiv 2312.11420): y = gamma' * normalize(x) + beta', only gamma and beta trained, here as offsets."""

import numpy as np


def normalized(x, context):
    """(x - mean) / sqrt(var + eps) over the last axis; an RMS norm takes no mean off."""
    centre = np.mean(x, axis=-1, keepdims=True) if context["centered"] else 0.0
    spread = np.mean((x - centre) ** 2, axis=-1, keepdims=True)
    return (x - centre) / np.sqrt(spread + context["eps"])


def oracle(x, W, b, p, method, context):
    y = normalized(x, context) * (W[:, 0] + p["g"][:, 0])
    return y if b is None else y + b + p["d"]
