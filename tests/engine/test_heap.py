"""Freed memory is kept for the length of a run, and goes back to the system after it."""

import resource

import pytest
import torch

from trimtab.engine.heap import heap_kept, mallopt

pytestmark = pytest.mark.skipif(mallopt() is None, reason="the C library is not glibc")
ENTRIES = 16 << 20  # 64 MiB of float32: above every threshold glibc moves to by itself


def faults_of(times: int) -> int:
    """Pages touched first while a large block is filled and freed again."""
    for _ in range(20):  # the heap finds its size
        torch.ones(ENTRIES)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(ENTRIES)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_a_block_is_mapped_anew_every_time_without_and_once_within():
    pages = ENTRIES * 4 // resource.getpagesize()
    outside = faults_of(4)
    if outside < 4 * pages // 2:
        pytest.skip("large pages: a block costs few faults here")
    with heap_kept():
        assert faults_of(4) < pages // 2


def test_memory_goes_back_after_it():
    def resident() -> int:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    with heap_kept():
        before = resident()
        torch.ones(ENTRIES)
        assert resident() - before > 2 * ENTRIES
    assert resident() - before < ENTRIES


def test_an_error_within_ends_it_too():
    with pytest.raises(RuntimeError, match="inside"), heap_kept():
        raise RuntimeError("inside")
    assert faults_of(2) > 0
