"""What an ingest knows of the fleet where a job must meet its deadline: read then, and kept for a moment."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from typing import Any, Final

import msgspec

from lepton_ai import topology
from lepton_ai.device import read_workers, worker_keys
from lepton_ai.errors import DeadlineUnattainable
from lepton_ai.placement.costs import CostModel
from lepton_ai.terms import Terms
from pipeline.cluster import Cluster
from pipeline.deadlines import Backlog, combined, unattainable
from pipeline.ingest.redispy import broker_errors

__all__ = ["Outlook"]

#: So old it may be: routers tell of their work no more often than once a heartbeat.
_FRESH_S: Final = 0.5
_BACKLOG = msgspec.msgpack.Decoder(Backlog)


class Outlook:
    """The fleet, what it has to do, and what it has learned."""

    def __init__(self, client: Any) -> None:
        self._redis = client
        self._read_at = -_FRESH_S
        self._cluster = Cluster()
        self._model = CostModel()
        self._learned: bytes | None = None
        """The snapshot that the model was made of."""
        self._backlog = Backlog()
        self._looking = asyncio.Lock()

    async def unattainable(self, kernel: str, terms: Terms, before: int) -> DeadlineUnattainable | None:
        """Why a job cannot end by its deadline that comes now, behind so many of its request; None where it can.

        BrokerUnavailable where the broker does not answer.
        """
        async with self._looking:  # whoever comes meanwhile goes by what the first has found
            if time.monotonic() >= self._read_at + _FRESH_S:
                await self._look()
        await asyncio.sleep(0)  # of thousands of jobs in one request, each takes half a millisecond from everybody
        left_s, due_in_s = terms.deadline_s or 0.0, terms.delay_s or 0.0
        backlog = self._backlog.behind(before, terms.options.urgency)
        return unattainable(kernel, terms.options, left_s, backlog, self._cluster, self._model, due_in_s=due_in_s)

    async def _look(self) -> None:
        async with broker_errors():
            holders = await self._redis.smembers(topology.HOLDERS)
            tenants = await self._redis.smembers(topology.LANES)
            lanes = [topology.LANE, *(name.decode(errors="replace") for name in tenants)]
            backlogs = [topology.backlog(name.decode(errors="replace")) for name in holders]
            async with self._redis.pipeline(transaction=False) as pipeline:
                pipeline.get(topology.MODEL)
                pipeline.mget(worker_keys(holders))
                pipeline.mget(backlogs or [topology.LANE])
                for name in chain.from_iterable(map(topology.lane_lists, lanes)):
                    pipeline.llen(name)
                learned, workers, told, *lengths = await pipeline.execute()
        found = read_workers(workers)
        self._cluster.refresh(found)
        for each in found:
            if each.state is not None:
                self._cluster.heard(each.incarnation, each.state)
        if learned != self._learned:
            # A large fleet's is read in most of a second, and written anew every ten.
            model = CostModel()
            await asyncio.to_thread(model.restore, learned)
            self._model, self._learned = model, learned
        lists = len(topology.lane_lists())
        self._backlog = combined(_read(told), [sum(lengths[number::lists]) for number in range(lists)])
        self._read_at = time.monotonic()


def _read(told: Sequence[bytes | None]) -> list[Backlog]:
    found = []
    for each in told:
        with suppress(msgspec.DecodeError):  # a worker's, which tells none, or another release's
            found.append(_BACKLOG.decode(each or b""))
    return [each for each in found if each.is_possible()]
