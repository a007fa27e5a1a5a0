"""Quarantine: kernels that a device may not run, since what it computed there differed from what another computed.

A fleet has one list, in the broker. The worker that saw the difference writes into it; every worker of that device
looks at it when it starts and with each heartbeat, and announces such a kernel no more until somebody lifts it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress

import msgspec

from lepton_ai.device import kind_of
from lepton_ai.errors import InvalidSettings

__all__ = ["Quarantined", "field", "read"]


class Quarantined(msgspec.Struct, frozen=True):
    """A kernel that a device may not run, and why."""

    kernel: str
    device: str
    """A device (`gpu.h100`), or every one of a kind (`cpu`)."""
    reason: str
    """For people: what differed from what, and by how much."""
    difference: float = 0.0
    """Relative to the larger of 1 and what was expected; infinite where names, dtypes or shapes do."""
    tolerance: float = 0.0
    worker: str = ""
    """The incarnation that saw it."""
    job: str = ""
    shapes: dict[str, list[int]] = {}
    """Of its inputs' arrays."""
    at: float = 0.0
    """Seconds since the epoch."""

    def holds_for(self, device: str) -> bool:
        """Whether a device of this name is meant."""
        if self.device == device:
            return True
        with suppress(InvalidSettings):
            return self.device == kind_of(device)
        return False


def field(kernel: str, device: str) -> str:
    """Where it stands in the hash `topology.QUARANTINE`."""
    return f"{kernel} {device}"


def read(found: Mapping[bytes, bytes] | Iterable[bytes]) -> list[Quarantined]:
    """What stands in the hash, by kernel and device; what is none is left out: another release may have written it."""
    flat = list(found.items()) if isinstance(found, Mapping) else _pairs(found)
    entries = []
    for _, value in flat:
        with suppress(msgspec.DecodeError):
            entries.append(_DECODER.decode(value))
    return sorted(entries, key=lambda each: (each.kernel, each.device))


_DECODER = msgspec.msgpack.Decoder(Quarantined)


def _pairs(found: Iterable[bytes]) -> list[tuple[bytes, bytes]]:
    words = list(found)
    return list(zip(words[::2], words[1::2], strict=True))
