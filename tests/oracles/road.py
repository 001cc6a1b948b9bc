"""RoAd (arXiv 2409.00119, eq. 3): R of 2×2 blocks α (cos θ, −sin θ; sin θ, cos θ), each entry with its own α and θ."""

import numpy as np


def oracle(x, W, b, p, method, context):
    out, group = W.shape[0], method.group_size
    half, theta, alpha = group // 2, p["theta"], p["alpha"]
    R = np.zeros((out, out))
    for start in range(0, out, group):
        for place in range(half):
            one, two = start + place, start + half + place
            if method.angles == 1:
                at = [start // 2 + place] * 4
            elif method.angles == 2:
                at = [one, one, two, two]
            else:
                at = [2 * start + place, 2 * start + group + place]
                at = [at[0], at[1], at[1] + half, at[0] + half]
            R[one, one] = alpha[at[0]] * np.cos(theta[at[0]])
            R[one, two] = -alpha[at[1]] * np.sin(theta[at[1]])
            R[two, one] = alpha[at[2]] * np.sin(theta[at[2]])
            R[two, two] = alpha[at[3]] * np.cos(theta[at[3]])
    y = np.einsum("...i,oi->...o", x, W)
    return (y if b is None else y + b) @ R.T
