"""Freed memory stays with the process within the block, and goes back afterwards."""

import platform
from pathlib import Path

import pytest
import torch

from veneer.train.allocator import kept_memory

STATM = Path("/proc/self/statm")
MEGABYTE = 1 << 20


def resident() -> int:
    return int(STATM.read_text().split()[1]) * 4096


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept_and_then_returned():
    def allocate_and_free() -> None:
        torch.ones(64 * MEGABYTE // 4)

    allocate_and_free()
    start = resident()
    with kept_memory() as kept:
        assert kept
        allocate_and_free()
        assert resident() - start > 50 * MEGABYTE
    assert resident() - start < 20 * MEGABYTE
    allocate_and_free()
    assert resident() - start < 20 * MEGABYTE


def test_elsewhere_nothing_is_changed(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    with kept_memory() as kept:
        assert not kept
