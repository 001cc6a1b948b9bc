"""GPS (arXiv 2312.10136): each output neuron gets offsets at equally many of its input connections."""

import numpy as np


def oracle(x, W, b, p, method, context):
    new, per_neuron = W.copy(), np.zeros(W.shape[0], dtype=int)
    for place, offset in zip(p["index"], p["value"], strict=True):
        neuron, connection = int(place) // W.shape[1], int(place) % W.shape[1]
        new[neuron, connection] += offset
        per_neuron[neuron] += 1
    assert len(set(per_neuron.tolist())) == 1
    y = np.einsum("...i,oi->...o", x, new)
    return y if b is None else y + b
