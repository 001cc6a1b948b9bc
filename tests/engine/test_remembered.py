"""Products of many shapes leave no memory behind."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from trimtab.engine.remembered import LIMITS

MEASURE = """
import sys, torch
from trimtab.core.product import product
from trimtab.engine.remembered import few_shapes_remembered
if sys.argv[1] == "few":
    few_shapes_remembered()
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
W, x = torch.randn(512, 256), torch.randn(400, 256)
product(x[:50], W)
before = anonymous()
for rows in range(100, 300):
    product(x[:rows], W)
print(anonymous() - before)
"""


def grown(limit: str) -> float:
    """Megabytes that products of 200 shapes leave in a process of their own."""
    environment = {name: value for name, value in os.environ.items() if name not in LIMITS}
    command = [sys.executable, "-c", MEASURE, limit]
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN in this torch")
def test_two_hundred_shapes_leave_what_a_few_leave() -> None:
    few = grown("few")
    assert few < 60
    assert few < grown("all") / 2
