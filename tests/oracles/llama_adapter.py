"""LLaMA-Adapter (arXiv 2303.16199, eq. 5 to 8, official code): [tanh(g) softmax(S_prompt), softmax(S_text)] V.

Prompt keys are W_k P + b_k, not rotated, while queries and text keys are.
"""

import numpy as np


def turned(v, position, theta):
    half = len(v) // 2
    out = np.empty_like(v)
    for i in range(half):
        angle = position * theta ** (-i / half)
        out[i] = v[i] * np.cos(angle) - v[i + half] * np.sin(angle)
        out[i + half] = v[i + half] * np.cos(angle) + v[i] * np.sin(angle)
    return out


def softmax(scores):
    e = np.exp(scores - scores.max())
    return e / e.sum()


def oracle(x, W, b, p, method, context):
    heads, key_heads, theta, mask = (context[name] for name in ("heads", "key_heads", "theta", "mask"))
    own = p["attention"]
    prompt_k, prompt_v = own["P"] @ W["k"].T + b["k"], own["P"] @ W["v"].T + b["v"]
    out = np.zeros_like(x)
    for row in range(x.shape[0]):
        q, k, v = (x[row] @ W[role].T + b[role] for role in "qkv")
        size = q.shape[-1] // heads
        joined = np.zeros((x.shape[1], heads * size))
        for head in range(heads):
            mine = slice(head * size, (head + 1) * size)
            group = head // (heads // key_heads)
            theirs = slice(group * size, (group + 1) * size)
            for place in range(x.shape[1]):
                if not mask[row, place]:
                    continue
                query = turned(q[place, mine], place, theta)
                seen = [j for j in range(place + 1) if mask[row, j]]
                text = np.array([turned(k[j, theirs], j, theta) @ query for j in seen]) / np.sqrt(size)
                prompt = prompt_k[:, theirs] @ query / np.sqrt(size)
                weights = np.concatenate([np.tanh(own["g"][head]) * softmax(prompt), softmax(text)])
                joined[place, mine] = weights @ np.concatenate([prompt_v[:, theirs], v[seen][:, theirs]])
        out[row] = joined @ W["o"].T + b["o"]
    return out
