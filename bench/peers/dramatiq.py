"""dramatiq on its Redis broker, with its Redis result backend.

What made it nine times faster with one thread: a prefetch of 64 instead of two a thread, after which its consumer naps.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.encoder import PickleEncoder
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from bench import peer, synthetic
from bench.load import Load

_WAIT_MS = 300_000

_backend = RedisBackend(url=peer.broker_url(), encoder=PickleEncoder())
broker = RedisBroker(
    url=peer.broker_url(), middleware=[Results(backend=_backend, store_results=True, result_ttl=3600_000)]
)
dramatiq.set_broker(broker)
dramatiq.set_encoder(PickleEncoder())
_actors = {
    name: dramatiq.actor(function, actor_name=name.replace(".", "_")) for name, function in synthetic.FUNCTIONS.items()
}


class Peer(peer.Peer):
    """One worker process with a thread for each job that may compute at once."""

    settings = "one process, a thread a job at once, prefetch 64; pickle; no middleware but results; a group"

    def start(self) -> None:
        os.environ["dramatiq_queue_prefetch"] = "64"  # noqa: SIM112 - its name
        self.work("worker", "dramatiq", __name__, "--processes", "1", "--threads", str(self.place.parallel))

    def run(self, load: Load, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        actor = _actors[load.kernel]
        group = dramatiq.group([actor.message(**row) for row in rows]).run()
        return list(group.get_results(block=True, timeout=_WAIT_MS))
