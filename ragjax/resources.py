"""What this machine has: memory, disk, processor cores and open files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ragjax.errors import InputError


def free_disk(folder: Path) -> int:
    """Bytes that are free where a folder lies, or will lie."""
    folder = folder.absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free


def host_memory() -> int | None:
    """Bytes of memory that this machine has; None where it does not tell."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None


def size_text(size: int) -> str:
    """Bytes as people read them."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:,.2f} {name}"
    return f"{size / 2**10:.1f} KiB"


FEW_FILES = 64  # that a process has open besides


def raise_open_file_limit(count: int) -> None:
    """Lets this process map `count` files more: each holds a descriptor, of which shells allow only 1,024 or so.

    Raises `InputError` where this machine allows fewer. Windows has no such limit.
    """
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY:
        if count + FEW_FILES > hard:
            raise InputError(
                f"the index has {count} files, and this process may open only {hard}; raise the limit (ulimit -Hn), or "
                "build the index with a larger index.shard_size"
            )
        soft = min(soft, hard - count)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft + count, hard))


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
