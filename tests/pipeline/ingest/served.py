"""What tests of the ingest share: one as a process of its own, and how it says that something is wrong."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from lepton_ai import services


@contextmanager
def serving(broker_url: str, **settings: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """An ingest: its process and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {"LEPTON_REDIS_URL": broker_url, "LEPTON_HTTP_PORT": str(port), "LEPTON_HTTP_HOST": "127.0.0.1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "ingest"],
        env=services.environ(os.environ | own | settings),
        stderr=subprocess.PIPE,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(400):
            try:
                httpx.get(f"{url}/healthz", timeout=2)
                break
            except httpx.HTTPError:
                time.sleep(0.05)
        yield process, url
    finally:
        process.terminate()
        _, told = process.communicate(timeout=15)
        assert b"Traceback" not in told, told.decode()


def problem(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/problem+json")
    body: dict[str, Any] = response.json()
    return body
