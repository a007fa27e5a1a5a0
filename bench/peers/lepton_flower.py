"""Lepton while somebody listens to Celery's events, as Flower does. `python -m bench.peers.lepton_flower` listens."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Any

import redis

from bench.load import NOOP
from bench.peers import lepton
from lepton_ai.settings import Settings
from pipeline.processes import Program, environment
from queues.app import make_app

_NAME = "listener"
#: The router asks once a second whether anybody listens; until it knows, a job is sent so often.
_EACH_S = 0.2
_HEARD_S = 15.0


class Peer(lepton.Peer):
    """During its turns a listener runs beside it, in a process of its own."""

    settings = f"{lepton.Peer.settings}; a receiver of Celery's events beside it"

    def wake(self) -> None:
        with redis.Redis.from_url(self.place.broker_url) as broker:
            before: Any = broker.pubsub_numpat()
            own = {"LEPTON_REDIS_URL": self.place.broker_url}
            self.processes.start(Program(_NAME, ("-m", __name__), environment(own)))
            while broker.pubsub_numpat() == before:
                time.sleep(0.02)
        heard, until = self._heard(), time.monotonic() + _HEARD_S
        while self._heard() == heard:
            if time.monotonic() > until:
                raise TimeoutError(f"nobody heard an event of Celery's in {_HEARD_S:g} s")
            self.one(NOOP, NOOP.rows(1)[0])
            time.sleep(_EACH_S)

    def rest(self) -> None:
        self.processes.stop([_NAME], 5)

    def stop(self) -> None:
        self.rest()
        super().stop()

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "celery_events_heard": self._heard()}

    def _heard(self) -> int:
        """How many events the listeners of all turns have told of."""
        with self._log(_NAME) as log:
            return sum(map(int, Path(log.name).read_text().split()))


def main() -> None:
    """Counts what it hears until it is told to end, and tells of the first at once."""
    app = make_app(Settings.read())
    heard = told = 0

    def count(event: dict[str, Any]) -> None:
        nonlocal heard, told
        heard += event["type"].startswith("task-")
        if heard and not told:
            told = heard
            print(told, flush=True)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        with app.connection_for_read() as connection:
            app.events.Receiver(connection, handlers={"*": count}).capture(limit=None, timeout=None)
    finally:
        print(heard - told)


if __name__ == "__main__":
    main()
