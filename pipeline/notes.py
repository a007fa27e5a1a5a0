"""How placements are noted: those that differ in their job, reason and waits only are written from one encoding."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

import msgspec

from lepton_ai.job import Estimate, Placement

__all__ = ["Note", "packed", "written"]

_MSGPACK = msgspec.msgpack.Encoder()
_FLOAT: Final = struct.Struct(">d")
#: Stands where a wait is to be written: no number, and bytes that are in no text.
_BLANK: Final = b"\xff\xf8\x00\x00\x00\xff\xff\xff"
_WAIT: Final[float] = _FLOAT.unpack(_BLANK)[0]


def packed(seconds: float) -> bytes:
    """A wait as `Note.of` takes it."""
    return _FLOAT.pack(seconds)


def written(text: str) -> bytes:
    """A reason as `Note.of` takes it."""
    return _MSGPACK.encode(text)


class Note:
    """A Placement that many jobs share but for the job, the reason and the waits.

    These are of its own device, and of each candidate.
    """

    def __init__(self, placement: Placement) -> None:
        candidates = [msgspec.structs.replace(each, estimate=_blank(each.estimate)) for each in placement.candidates]
        estimate = _blank(placement.estimate)
        blank = msgspec.structs.replace(placement, job="", reason="", estimate=estimate, candidates=tuple(candidates))
        # The job comes first, so the first empty text is its own; and no text has the mark of an empty one in it.
        empty = _MSGPACK.encode("")
        self._head, _, rest = _MSGPACK.encode(blank).partition(empty)
        before, name, rest = rest.partition(b"reason" + empty)
        self._first = before + name.removesuffix(empty)
        self._second, *pieces = rest.split(_BLANK)
        self._own = pieces.pop(0) if estimate is not None else None
        waiting = [at for at, each in enumerate(candidates) if each.estimate is not None]
        self._pieces = list(zip(waiting, pieces, strict=True))

    def of(self, job: str, reason: bytes, wait: bytes, waits: Sequence[bytes]) -> bytes:
        """The encoded Placement of a job: why, with the wait of its own device, and those of all candidates."""
        parts = [self._head, _MSGPACK.encode(job), self._first, reason, self._second]
        if self._own is not None:
            parts += (wait, self._own)
        for at, piece in self._pieces:
            parts += (waits[at], piece)
        return b"".join(parts)


def _blank(estimate: Estimate | None) -> Estimate | None:
    return None if estimate is None else msgspec.structs.replace(estimate, wait_s=_WAIT)
