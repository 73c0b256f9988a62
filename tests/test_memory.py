"""Freed memory is retained inside the block and released after it. A malloc that the user has tuned is not changed."""

import itertools
import os
import platform
import threading

import pytest
import torch

from fastddpm.engine import memory

resource = pytest.importorskip("resource")
pytestmark = [
    pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's"),
    pytest.mark.skipif(not memory._adjustable(), reason="malloc is tuned by the environment"),
]

CPU = torch.device("cpu")
SIZE = 48 << 20  # over every threshold of glibc's


def faults_of_another_tensor() -> int:
    """The fewest of some tries: a small block that lands where the last tensor was sends the next one elsewhere."""
    counts = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
    for _ in range(6):
        torch.empty(SIZE, dtype=torch.uint8).fill_(1)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return min(b - a for a, b in itertools.pairwise(counts))


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_freed_memory_is_kept_and_given_back():
    with memory.retain_freed_memory(CPU):
        with memory.retain_freed_memory(CPU):
            faults_of_another_tensor()
        assert faults_of_another_tensor() <= 8  # the inner block's end did not end the outer
        held = resident()
    assert held - resident() >= SIZE // 2


def test_malloc_is_as_usual_after_the_last_block(monkeypatch):
    seen = []
    monkeypatch.setattr(memory, "_adjust", seen.append)
    with pytest.raises(RuntimeError), memory.retain_freed_memory(CPU):
        with memory.retain_freed_memory(CPU):
            pass
        assert seen == [memory.RETAIN]
        raise RuntimeError
    assert seen == [memory.RETAIN, memory.GLIBC_DEFAULTS]


@pytest.mark.parametrize(("name", "value"), [("MALLOC_ARENA_MAX", "1"), ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")])
def test_a_tuned_malloc_is_left_alone(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(memory, "_adjust", lambda settings: pytest.fail("malloc was adjusted"))
    with memory.retain_freed_memory(CPU):
        pass


def test_a_gpu_s_chain_leaves_malloc_alone(monkeypatch):
    monkeypatch.setattr(memory, "_adjust", lambda settings: pytest.fail("malloc was adjusted"))
    with memory.retain_freed_memory(torch.device("cuda")):
        pass


def test_another_thread_leaves_malloc_alone(monkeypatch):
    """There it would keep nothing."""
    seen = []
    monkeypatch.setattr(memory, "_adjust", seen.append)

    def enter():
        with memory.retain_freed_memory(CPU):
            pass

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == []
