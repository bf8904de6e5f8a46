"""How much memory there is left."""

import os
from pathlib import Path

_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def free_memory_bytes() -> int:
    """Return how much memory may still be had: what the system says, and no more than the container's limit leaves.

    Where the system does not say (macOS), half of the memory there is.

    Example:
        >>> free_memory_bytes() > 0
        True
    """
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    if _MEMINFO.is_file():
        fields = (line.split() for line in _MEMINFO.read_text(encoding="ascii").splitlines())
        free = next((int(words[1]) * 1024 for words in fields if words[0] == "MemAvailable:"), free)
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdigit():
        free = min(free, max(0, int(most) - int(used.read_text())))
    return free
