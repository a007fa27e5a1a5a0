from __future__ import annotations

import asyncio
from typing import Any

import pytest
import redis.asyncio as redis

from lepton_ai import topology
from lepton_ai.device import Peaks
from lepton_ai.event import Observation
from lepton_ai.job import Options
from lepton_ai.placement.costs import CostModel
from lepton_ai.terms import Terms
from pipeline.ingest import outlook
from pipeline.ingest.outlook import Outlook
from queues.connection import Connection

PEAKS = Peaks(1e4, 1e12, float("inf"), 0.0, 0.0)
TERMS = Terms(Options(shapes={"n": 1}, must_meet=True), deadline_s=1.0)


def learn(connection: Connection, launches: int) -> None:
    """As telemetry keeps it."""
    model = CostModel()
    for _ in range(launches):
        model.learn(Observation("test.spin", "cpu", 1, 100, 0, 0.0, 0.1), PEAKS)
    connection.call("SET", topology.MODEL, model.snapshot())


def test_what_was_learned_is_read_anew_when_it_has_changed_only(
    broker_url: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large fleet that takes most of a second, in which nobody else would be answered."""
    read: list[Any] = []

    class Counted(CostModel):
        def restore(self, data: bytes | None) -> None:
            read.append(data)
            super().restore(data)

    monkeypatch.setattr(outlook, "CostModel", Counted)
    monkeypatch.setattr(outlook, "_FRESH_S", 0.0)

    async def ask() -> None:
        client = redis.Redis.from_url(broker_url)
        found = Outlook(client)
        learn(connection, 3)
        await asyncio.gather(*(found.unattainable("test.spin", TERMS, 0) for _ in range(5)))
        learn(connection, 4)
        await found.unattainable("test.spin", TERMS, 0)
        await client.aclose()

    asyncio.run(ask())
    assert len(read) == 2
