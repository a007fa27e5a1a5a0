"""Quarantine, as a worker heeds it: which of its kernels it may not run."""

from __future__ import annotations

import threading

import msgspec

from lepton_ai import topology
from lepton_ai.quarantine import Quarantined, field, read
from queues.connection import Connection

__all__ = ["Quarantine"]


class Quarantine:
    """Of one device. Slots read `reasons`, whoever sees a difference calls `add`, and the heartbeat calls `look`."""

    def __init__(self, device: str) -> None:
        self.reasons: dict[str, str] = {}
        """By kernel. Replaced as a whole: it may be read from any thread."""
        self._device = device
        self._lock = threading.Lock()
        self._untold: list[Quarantined] = []

    def add(self, entry: Quarantined) -> None:
        """From here on, and before the fleet knows, its kernel does not run here, where this device is meant."""
        with self._lock:
            self._untold.append(entry)
            if entry.holds_for(self._device):
                self.reasons = {**self.reasons, entry.kernel: entry.reason}

    def look(self, connection: Connection) -> list[Quarantined]:
        """Tells the fleet what was added, and takes over what it knows of this device; returns what was told."""
        with self._lock:
            told = list(self._untold)
        for each in told:
            connection.call("HSET", topology.QUARANTINE, field(each.kernel, each.device), msgspec.msgpack.encode(each))
        found = read(connection.call("HGETALL", topology.QUARANTINE))
        with self._lock:
            self._untold = [each for each in self._untold if each not in told]
            known = {each.kernel: each.reason for each in [*found, *self._untold] if each.holds_for(self._device)}
            if known != self.reasons:
                self.reasons = known
        return told
