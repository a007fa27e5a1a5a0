"""Replies to those who wait: each result is handed to the requests that wait for its job."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import structlog

from lepton_ai import results, topology
from lepton_ai.errors import BrokerUnavailable, LeptonError
from lepton_ai.job import Meta
from pipeline.ingest.redispy import broker_errors

__all__ = ["Replies"]

_POP_AT_ONCE = 256
_POP_S = 5.0
_RETRY_S = 1.0

log = structlog.get_logger()


class Replies:
    """Whoever waits in this ingest, and the reply list of its jobs, over a connection that nothing else uses."""

    def __init__(self, client: Any, source: str) -> None:
        self._redis = client
        self.name = topology.reply(source)
        self._waiters: defaultdict[str, set[asyncio.Future[Meta]]] = defaultdict(set)

    def __len__(self) -> int:
        """How many jobs are waited for."""
        return len(self._waiters)

    @contextlib.contextmanager
    def waiting(self, ids: Iterable[str]) -> Iterator[dict[str, asyncio.Future[Meta]]]:
        """Futures for the results of these jobs, forgotten at the end."""
        loop = asyncio.get_running_loop()
        waiters: dict[str, asyncio.Future[Meta]] = {job_id: loop.create_future() for job_id in ids}
        for job_id, future in waiters.items():
            self._waiters[job_id].add(future)
        try:
            yield waiters
        finally:
            for job_id, future in waiters.items():
                others = self._waiters.get(job_id)
                if others is not None:
                    others.discard(future)
                    if not others:
                        del self._waiters[job_id]

    def hand_out(self, meta: Meta) -> None:
        """Tells whoever waits for a job that it has ended."""
        for future in self._waiters.pop(meta.task_id, ()):
            if not future.done():
                future.set_result(meta)

    def cancel(self) -> None:
        """Lets everybody go who waits."""
        for waiters in list(self._waiters.values()):
            for future in waiters:
                future.cancel()

    async def run(self) -> None:
        """Hands out what arrives; the rest is read from its keys when it is asked for."""
        while True:
            try:
                async with broker_errors():
                    popped = await self._redis.blmpop(_POP_S, 1, self.name, direction="LEFT", count=_POP_AT_ONCE)
            except BrokerUnavailable:
                await asyncio.sleep(_RETRY_S)
                continue
            for raw in popped[1] if popped else ():
                try:
                    self.hand_out(results.read(raw))
                except LeptonError as error:
                    log.error("reply_unreadable", reason=error.message)

    async def close(self) -> None:
        await self._redis.aclose()
