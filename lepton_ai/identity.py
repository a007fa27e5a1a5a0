"""Job ids: UUID version 7 (RFC 9562), so that an id carries the minute in which its job was made."""

from __future__ import annotations

import os
import time
import uuid

__all__ = ["made_at", "minute_of", "new_id", "new_ids"]


def new_id() -> str:
    """A fresh job id."""
    return new_ids(1)[0]


def new_ids(count: int) -> list[str]:
    """`count` fresh job ids of this moment."""
    stamp = f"{time.time_ns() // 1_000_000 & 0xFFFF_FFFF_FFFF:012x}"
    head = f"{stamp[:8]}-{stamp[8:]}-7"
    noise = os.urandom(10 * count).hex()
    found = []
    for at in range(0, 20 * count, 20):
        variant = "89ab"[int(noise[at + 3], 16) & 3]
        found.append(f"{head}{noise[at : at + 3]}-{variant}{noise[at + 4 : at + 7]}-{noise[at + 7 : at + 19]}")
    return found


def minute_of(job_id: str) -> int | None:
    """The minute (since the epoch) that an id of ours carries, or None for a foreign id."""
    at = made_at(job_id)
    return None if at is None else int(at) // 60


def made_at(job_id: str) -> float | None:
    """When (seconds since the epoch) an id of ours was made, or None for a foreign id."""
    try:
        parsed = uuid.UUID(job_id)
    except ValueError:
        return None
    return (parsed.int >> 80) / 1000 if parsed.version == 7 else None
