"""Job ids: UUID version 7 (RFC 9562), so that an id carries the minute in which its job was made."""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from typing import Final

__all__ = ["ids", "made_at", "minute_of", "new_id", "new_ids"]

#: The digit that holds the variant, by a random one.
_VARIANT: Final = {digit: "89ab"[number & 3] for number, digit in enumerate("0123456789abcdef")}
#: An id as `ids` writes it; UUIDs are read in other spellings too.
_OURS: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
#: Noise is asked of the system for so many ids at once.
_AT_ONCE: Final = 64


def new_id() -> str:
    """A fresh job id."""
    return next(ids(1))


def new_ids(count: int) -> list[str]:
    """`count` fresh job ids."""
    return list(islice(ids(), count))


def ids(at_once: int = _AT_ONCE) -> Iterator[str]:
    """Fresh job ids without end, each of the moment in which it is taken."""
    made_ms, head = -1, ""
    while True:
        noise = os.urandom(10 * at_once).hex()
        for at in range(0, 20 * at_once, 20):
            if (now_ms := time.time_ns() // 1_000_000) != made_ms:
                made_ms, stamp = now_ms, f"{now_ms & 0xFFFF_FFFF_FFFF:012x}"
                head = f"{stamp[:8]}-{stamp[8:]}-7"
            variant = _VARIANT[noise[at + 3]]
            yield f"{head}{noise[at : at + 3]}-{variant}{noise[at + 4 : at + 7]}-{noise[at + 7 : at + 19]}"


@lru_cache(maxsize=1024)  # of a job that ends it is asked more than once
def minute_of(job_id: str) -> int | None:
    """The minute (since the epoch) that an id of ours carries, or None for a foreign id."""
    at_ms = _made_at_ms(job_id)
    return None if at_ms is None else at_ms // 60_000


def made_at(job_id: str) -> float | None:
    """When (seconds since the epoch) an id of ours was made, or None for a foreign id."""
    at_ms = _made_at_ms(job_id)
    return None if at_ms is None else at_ms / 1000


def _made_at_ms(job_id: str) -> int | None:
    if _OURS.fullmatch(job_id):
        return int(job_id[:8] + job_id[9:13], 16)
    try:
        parsed = uuid.UUID(job_id)
    except ValueError:
        return None
    return parsed.int >> 80 if parsed.version == 7 else None
