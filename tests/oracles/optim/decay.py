"""The gradient of f(w) + factor/2 |w|^2."""


def oracle(gradients, weights, rule):
    for g, w in zip(gradients, weights, strict=True):
        yield g + rule.factor * w
