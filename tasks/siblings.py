"""What the workers of one host use of its processors, told to each other: load that Lepton causes is not foreign."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import msgspec

from lepton_ai import topology
from queues.broker import Broker
from tasks.host import boot

__all__ = ["Siblings"]

#: When somebody told it, in seconds since the epoch by the host's clock, and how many processors he used.
_Told = tuple[float, float]
_DECODER = msgspec.msgpack.Decoder(_Told)


class Siblings:
    """The other workers of this host, in its containers too; used by the heartbeat's thread."""

    def __init__(self, incarnation: str, lease_s: float) -> None:
        self._own = incarnation.encode()
        self._key = topology.host(boot())
        self._lease_s = lease_s
        self.processors = 0.0
        """How many the others used when they last told."""

    def tell(self, broker: Broker, processors: float) -> None:
        """Tells them how many we used, and reads what they told. A broker that is full keeps the former for itself."""
        connection, now = broker.connection, time.time()
        value = msgspec.msgpack.encode((now, processors))
        commands = [
            ("HSET", self._key, self._own, value),
            ("PEXPIRE", self._key, round(self._lease_s * 1000)),
            ("HGETALL", self._key),
        ]
        *_, kept = connection.receive(connection.send(commands))
        found = _read(kept) if isinstance(kept, Mapping) else {}
        found.pop(self._own, None)
        gone = [each for each, (at, _) in found.items() if at < now - self._lease_s]
        self.processors = sum(used for each, (_, used) in found.items() if each not in gone)
        if gone:
            connection.receive(connection.send([("HDEL", self._key, *gone)]))


def _read(kept: Mapping[bytes, Any]) -> dict[bytes, _Told]:
    found = {}
    for incarnation, value in kept.items():
        with suppress(msgspec.DecodeError):  # another release's
            found[incarnation] = _DECODER.decode(value)
    return found
