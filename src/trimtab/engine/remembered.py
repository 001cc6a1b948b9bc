"""How many shapes of matrix products oneDNN remembers: as many as a few steps need, in place of a thousand.

oneDNN writes machine code for every shape of a product and keeps it, and torch's layer above keeps the object that
calls it. A packed batch has another number of tokens at almost every step, so nearly all of that is never used again:
one shape takes 0.7 to 2 MB, a LoRA step on SmolLM2-135M 20 MB, and the limit is 1,024 shapes.
"""

from __future__ import annotations

import os

SHAPES = 32
"""The products of two to four steps, forward and backward: enough where rows have one length."""
LIMITS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Read once, by oneDNN at its first product and by torch's layer above it as early as when torch is loaded."""


def few_shapes_remembered() -> None:
    """Set the limits for this process, unless its environment has them or it is too late.

    The command line calls this before torch is loaded. A program of yours that imports torch first, and computes many
    shapes of its own (images of one size after the other), keeps what its environment says of the second limit.
    """
    for name in LIMITS:
        os.environ.setdefault(name, str(SHAPES))
