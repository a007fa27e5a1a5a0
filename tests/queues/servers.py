"""What tests of servers that are started and killed share."""

from __future__ import annotations

import os
import select
import sys

import pytest

from queues.connection import Connection

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG and pidfd are Linux's")


def server_pid(url: str) -> int:
    connection = Connection(url, "info")
    info = connection.call("INFO", "server").decode()
    connection.close()
    return int(info.partition("process_id:")[2].split()[0])


def ends(pid: int, timeout_s: float = 10) -> bool:
    """Waits for a process, anybody's, to end."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], timeout_s)[0])
    finally:
        os.close(descriptor)
