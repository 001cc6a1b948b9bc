"""Freed memory is kept for the length of a run, and goes back to the system after it."""

import multiprocessing
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from trimtab.engine.heap import heap_kept, mallopt, trim

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


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def faults_outside_and_within() -> tuple[int, int]:
    outside = faults_of(4)
    with heap_kept():
        return outside, faults_of(4)


def grown_within_and_after() -> tuple[int, int]:
    with heap_kept():
        before = resident()
        torch.ones(ENTRIES)
        within = resident() - before
    return within, resident() - before


def grown_before_and_after_a_trim() -> tuple[int, int]:
    with heap_kept():
        before = resident()
        pieces = [torch.ones(ENTRIES // 16) for _ in range(16)]
        del pieces[::2]  # holes, between what is still in use
        grown = resident() - before
        trim()
        return grown, resident() - before


def faults_after_an_error() -> int:
    with pytest.raises(RuntimeError, match="inside"), heap_kept():
        raise RuntimeError("inside")
    return faults_of(2)


def alone(measured: Callable[[], Any]) -> Any:
    """What a function comes to in a process of its own, whose heap nothing has used before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measured).result()


@pytest.mark.slow
def test_a_block_is_mapped_anew_every_time_without_and_once_within() -> None:
    pages = ENTRIES * 4 // resource.getpagesize()
    outside, within = alone(faults_outside_and_within)
    if outside < 4 * pages // 2:
        pytest.skip("large pages: a block costs few faults here")
    assert within < pages // 2


@pytest.mark.slow
def test_memory_goes_back_after_it() -> None:
    within, after = alone(grown_within_and_after)
    assert within > 2 * ENTRIES
    assert after < ENTRIES


@pytest.mark.slow
def test_holes_go_back_when_asked() -> None:
    grown, after = alone(grown_before_and_after_a_trim)
    assert grown > 4 * ENTRIES * 0.9
    assert after < 4 * ENTRIES * 0.6


@pytest.mark.slow
def test_an_error_within_ends_it_too() -> None:
    assert alone(faults_after_an_error) > 0
