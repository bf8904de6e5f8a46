"""Free memory is what the system and the container leave."""

import os

from veneer.files import memory
from veneer.files.memory import free_memory_bytes


def test_free_memory_is_what_the_system_says(tmp_path, monkeypatch):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  9000 kB\nMemFree:   10 kB\nMemAvailable:   4000 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert free_memory_bytes() == 4000 * 1024
    (tmp_path / "memory.current").write_text("500\n")
    for most, expected in (("max", 4000 * 1024), ("1700", 1200), ("100", 0)):
        (tmp_path / "memory.max").write_text(f"{most}\n")
        assert free_memory_bytes() == expected
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "none")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "none")
    assert free_memory_bytes() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
