"""Job ids: UUID version 7 (RFC 9562), so that an id carries the minute in which its job was made.

Ids that are made one after the other count up in their last three digits and share the rest, so that jobs which travel
together (lepton_ai/bundle.py) need name only the first. What they share has 62 random bits.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from typing import Final

__all__ = ["ids", "made_at", "minute_of", "new_id", "new_ids", "run_of", "shared_by"]

#: The digit that holds the variant, by a random one.
_VARIANT: Final = {digit: "89ab"[number & 3] for number, digit in enumerate("0123456789abcdef")}
#: An id as `ids` writes it; UUIDs are read in other spellings too.
_OURS: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
#: So many ids follow one another, made within so many seconds; the last digits of each.
_RUN: Final = 128
_RUN_S: Final = 0.05
_TAILS: Final = tuple(f"{number:03x}" for number in range(16**3))


def new_id() -> str:
    """A fresh job id."""
    return next(ids())


def new_ids(count: int) -> list[str]:
    """`count` fresh job ids."""
    return list(islice(ids(), count))


def ids() -> Iterator[str]:
    """Fresh job ids without end, each of about the moment in which it is taken, in runs of up to 128."""
    while True:
        made_ns = time.time_ns()
        until_ns = made_ns + round(_RUN_S * 1e9)
        stamp, noise = f"{made_ns // 1_000_000 & 0xFFFF_FFFF_FFFF:012x}", os.urandom(9).hex()
        head = f"{stamp[:8]}-{stamp[8:]}-7{noise[:3]}-{_VARIANT[noise[3]]}{noise[4:7]}-{noise[7:16]}"
        for tail in _TAILS[:_RUN]:
            yield head + tail
            if time.time_ns() > until_ns:
                break


def run_of(first: str, count: int) -> tuple[str, ...]:
    """The ids of `count` jobs that follow one another, the first included; ValueError where there are not so many."""
    start = int(first[-3:], 16) if _OURS.fullmatch(first) else len(_TAILS)
    if not 0 < count <= len(_TAILS) - start:
        raise ValueError(f"no {count} ids begin with {first[:80]!r}")
    head = first[:-3]
    return tuple([head + tail for tail in _TAILS[start : start + count]])


def shared_by(job_id: str) -> str | None:
    """What an id shares with those that it may travel with; None where it is none of ours."""
    return job_id[:-3] if _OURS.fullmatch(job_id) else None


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
