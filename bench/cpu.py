"""CPU seconds by process, from /proc: of a process, and of all that it has started."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Mapping
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
CORES = len(os.sched_getaffinity(0))

Roles = Mapping[str, Iterable[int]]


def families(roles: Roles) -> dict[str, set[int]]:
    """The processes of each role: those named, and their descendants that no other role names."""
    named = {pid: role for role, pids in roles.items() for pid in pids}
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _fields(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: dict[str, set[int]] = {role: set() for role in roles}
    for pid, role in named.items():
        due = [pid]
        while due:
            each = due.pop()
            found[role].add(each)
            due += [child for child in children.get(each, ()) if child not in named]
    return found


def used_s(roles: Roles) -> dict[str, float]:
    """CPU seconds of each role so far, those of its ended children included."""
    return {role: sum(map(_used_s, pids)) for role, pids in families(roles).items()}


def rss_mb(pid: int) -> float:
    """What a process holds in memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def kill(pids: Iterable[int]) -> None:
    """Ends what is left of these processes, at once."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _used_s(pid: int) -> float:
    fields = _fields(pid)
    return sum(map(int, fields[11:15])) * _TICK_S if fields else 0.0


def _fields(pid: int) -> list[str]:
    """`/proc/<pid>/stat` from the state on (proc(5), field 3); empty where the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
