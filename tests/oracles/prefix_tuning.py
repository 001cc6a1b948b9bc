"""Prefix tuning (arXiv 2101.00190): head = softmax(q [P_k; k]^T / sqrt(d)) [P_v; v], P from an MLP of an embedding.

The prefix stands before the rotation: prefix token j is turned as position j, the text begins at position `length`.
Prefix tokens are seen by every query; among the text, attention is causal and skips padding.
"""

import numpy as np


def virtual(p, method):
    if method.hidden is None:
        return p["P"]
    z = p["shared"]
    return np.tanh(z["E"] @ z["V"].T + z["c"]) @ p["O"].T + p["o"]


def turned(v, position, theta):
    """Rotary embedding of one head's vector at one position."""
    half = len(v) // 2
    out = np.empty_like(v)
    for i in range(half):
        angle = position * theta ** (-i / half)
        out[i] = v[i] * np.cos(angle) - v[i + half] * np.sin(angle)
        out[i + half] = v[i + half] * np.cos(angle) + v[i] * np.sin(angle)
    return out


def oracle(x, W, b, p, method, context):
    heads, key_heads, theta, mask = (context[name] for name in ("heads", "key_heads", "theta", "mask"))
    length = method.length
    out = np.zeros((*x.shape[:2], W["o"].shape[0]))
    for row in range(x.shape[0]):
        q = x[row] @ W["q"].T + b["q"]
        k = np.concatenate([virtual(p["k"], method), x[row] @ W["k"].T + b["k"]])
        v = np.concatenate([virtual(p["v"], method), x[row] @ W["v"].T + b["v"]])
        size = q.shape[-1] // heads
        joined = np.zeros((x.shape[1], heads * size))
        for head in range(heads):
            mine = slice(head * size, (head + 1) * size)
            group = head // (heads // key_heads)
            theirs = slice(group * size, (group + 1) * size)
            keys = np.stack([turned(k[j, theirs], j, theta) for j in range(len(k))])
            for place in range(x.shape[1]):
                if not mask[row, place]:
                    continue
                query = turned(q[place, mine], length + place, theta)
                seen = [*range(length), *(length + j for j in range(place + 1) if mask[row, j])]
                scores = keys[seen] @ query / np.sqrt(size)
                share = np.exp(scores - scores.max())
                joined[place, mine] = share / share.sum() @ v[seen, theirs]
        out[row] = joined @ W["o"].T + b["o"]
    return out
