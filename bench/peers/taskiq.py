"""taskiq on its Redis list broker, with its Redis result backend. Its messages carry text alone, so bytes in base64."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping, Sequence
from typing import Any

from taskiq.serializers import MSGPackSerializer
from taskiq_redis import ListQueueBroker, RedisAsyncResultBackend

from bench import peer, synthetic
from bench.load import Load

_AT_ONCE = 100
_LOOK_S = 0.005
_WAIT_S = 300

_backend: RedisAsyncResultBackend[float] = RedisAsyncResultBackend(peer.broker_url(), result_ex_time=3600)
broker = (
    ListQueueBroker(peer.broker_url(), socket_timeout=None)
    .with_result_backend(_backend)
    .with_serializer(MSGPackSerializer())
)


@broker.task(task_name="bench.noop")
async def _noop(x: float, y: float, n: int, data: str) -> float:
    return synthetic.noop(x, y, n, base64.b64decode(data))


@broker.task(task_name="bench.spin")
async def _spin(x: float, y: float, n: int, data: str) -> float:
    return synthetic.spin(x, y, n, base64.b64decode(data))


_tasks = {"bench.noop": _noop, "bench.spin": _spin}


class Peer(peer.Peer):
    """A worker process for each job that may compute at once; the client asks a hundred things at once."""

    settings = "one worker process a job at once, async tasks, no parsing; a hundred sent and read at once"

    def start(self) -> None:
        workers = ["--workers", str(self.place.parallel), "--no-parse", "--log-level", "ERROR"]
        self.work("worker", "taskiq", "worker", f"{__name__}:broker", *workers)
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(broker.startup())

    def run(self, load: Load, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        return self._loop.run_until_complete(self._all(_tasks[load.kernel], rows))

    async def _all(self, task: Any, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        rows = [{**row, "data": base64.b64encode(row["data"]).decode()} for row in rows]
        jobs: list[Any] = []
        for first in range(0, len(rows), _AT_ONCE):
            jobs += await asyncio.gather(*(task.kiq(**row) for row in rows[first : first + _AT_ONCE]))
        totals: list[float] = []
        for first in range(0, len(jobs), _AT_ONCE):
            part = (job.wait_result(check_interval=_LOOK_S, timeout=_WAIT_S) for job in jobs[first : first + _AT_ONCE])
            for result in await asyncio.gather(*part):
                result.raise_for_error()
                totals.append(result.return_value)
        return totals

    def stop(self) -> None:
        if hasattr(self, "_loop"):
            self._loop.run_until_complete(broker.shutdown())
            self._loop.close()
        super().stop()
