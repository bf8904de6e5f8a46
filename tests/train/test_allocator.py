"""Freed memory stays with the process within the block, and goes back afterwards."""

import platform
import subprocess
import sys

import pytest

from veneer.train.allocator import kept_memory

CODE = """
from pathlib import Path
import torch
from veneer.train.allocator import kept_memory

MEGABYTE = 1 << 20

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def allocate_and_free():
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
"""
"""In a process of its own: the heap of one that has run other tests has holes of any size, and gives them back."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept_and_then_returned():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_elsewhere_nothing_is_changed(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    with kept_memory() as kept:
        assert not kept
