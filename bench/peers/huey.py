"""huey on Redis, with results that expire.

Results are read by `peek_many`, 500 at a time; `get` of each is a round trip each, or two.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from huey import RedisExpireHuey

from bench import peer, synthetic
from bench.load import Load

_AT_ONCE = 500
_LOOK_S = 0.005
_WAIT_S = 300

huey = RedisExpireHuey("bench", url=peer.broker_url(), expire_time=3600)
#: Pushes a note behind each result, which spares its waiter the polling and makes many slower.
notifying = RedisExpireHuey("bench", url=peer.broker_url(), expire_time=3600, notify_result=True)
_tasks = {
    each: {name: each.task(name=name.replace(".", "_"))(function) for name, function in synthetic.FUNCTIONS.items()}
    for each in (huey, notifying)
}


class Peer(peer.Peer):
    """One consumer with threads, or processes where jobs are to compute at once."""

    settings = "one thread where nothing is to run at once, else processes; peek_many in bulk, notify_result singly"

    def start(self) -> None:
        kind = ["-k", "thread" if self.place.parallel == 1 else "process", "-w", str(self.place.parallel)]
        served = f"{__name__}.{'notifying' if self.place.one_by_one else 'huey'}"
        self.work("worker", "huey.bin.huey_consumer", served, *kind, "--no-periodic", "--quiet")

    def run(self, load: Load, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        task = _tasks[huey][load.kernel]
        jobs = [task(**row).id for row in rows]
        totals: list[float] = []
        for first in range(0, len(jobs), _AT_ONCE):
            part = jobs[first : first + _AT_ONCE]
            found: dict[str, bytes] = {}
            while missing := [job for job in part if job not in found]:
                more = huey.storage.peek_many(missing)
                found |= more
                if not more:
                    time.sleep(_LOOK_S)
            totals += [huey.serializer.deserialize(found[job]) for job in part]
        return totals

    def one(self, load: Load, row: Mapping[str, Any]) -> float:
        return float(_tasks[notifying][load.kernel](**row).get(blocking=True, timeout=_WAIT_S))
