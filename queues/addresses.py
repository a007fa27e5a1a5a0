"""Our broker's address in Celery's and kombu's words, and how they are to talk to it."""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

__all__ = ["celery_addresses", "transport_options"]

#: Every client that consumes a list queue restores messages older than its own visibility timeout, so it must be the
#: same, and long, everywhere. Recovery is by leases (queues/broker.py) and does not wait for it.
_VISIBILITY_S: Final = 86_400


def celery_addresses(url: str) -> tuple[str, str]:
    """Our broker URL as Celery's broker and result-backend URLs."""
    parts = urlsplit(url)
    if parts.scheme != "unix":
        return url, url
    database = parse_qs(parts.query).get("db", ["0"])[0]
    rest = f"{parts.netloc}{parts.path}?virtual_host={database}"
    return f"redis+socket://{rest}", f"redis+socket://{rest}"


def transport_options(url: str) -> dict[str, Any]:
    """kombu's `broker_transport_options`, the same in every process."""
    options = {
        "visibility_timeout": _VISIBILITY_S,
        "socket_timeout": 30,
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        "health_check_interval": 25,
    }
    if urlsplit(url).scheme == "unix":
        del options["socket_keepalive"]  # TCP only
    return options
