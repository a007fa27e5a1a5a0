"""What tests of dead letters share: letters as they are left, and every client."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from lepton_ai import AsyncClient, Client, results, topology, wire
from lepton_ai.errors import JobDead
from lepton_ai.identity import new_id
from lepton_ai.job import Options
from queues.connection import Connection
from queues.embedded import EmbeddedBroker
from tests.pipeline.ingest.served import serving


@pytest.fixture(scope="module")
def ingest_url(_embedded: EmbeddedBroker) -> Iterator[str]:
    with serving(_embedded.url) as (_, url):
        yield url


class Asked:
    """Any client's verbs, called from a test that does not wait."""

    def __init__(self, url: str, *, is_async: bool) -> None:
        self._url, self._is_async = url, is_async

    def __getattr__(self, verb: str) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            async def work() -> Any:
                async with AsyncClient(self._url) as client:
                    found = getattr(client, verb)(*arguments, **more)
                    return await found if inspect.isawaitable(found) else found

            if self._is_async:
                return asyncio.run(work())
            with Client(self._url) as client:
                return getattr(client, verb)(*arguments, **more)

        return call


@pytest.fixture(params=["direct", "direct-async", "http", "http-async"])
def client(request: pytest.FixtureRequest, broker_url: str, ingest_url: str) -> Asked:
    url = broker_url if request.param.startswith("direct") else ingest_url
    return Asked(url, is_async=request.param.endswith("async"))


def bury(connection: Connection, job: str | None = None, code: str = "poison", **more: Any) -> tuple[str, str]:
    """A dead letter as a worker or router leaves it: its entry and its job."""
    job = job or new_id()
    lane = more.pop("lane", topology.LANE)
    message = more.pop("message", None) or wire.envelope(
        job, "a.b", {"x": np.zeros((2, 3)), "k": 3}, more.pop("options", Options()), lane=lane
    )
    fields = {"job": job, "kernel": "a.b", "code": code, "reason": "it killed 3 workers", "attempts": "3"} | more
    words = [word for pair in (fields | {"message": message}).items() for word in pair]
    record = results.encode(results.failure(job, JobDead("it killed 3 workers")), "json")
    connection.many([("SET", topology.result(job), record), ("HSET", topology.ATTEMPTS, job, 3)])
    entry: bytes = connection.call("XADD", topology.DEAD, "*", *words)
    return entry.decode(), job


def unreadable(connection: Connection) -> str:
    added: bytes = connection.call("XADD", topology.DEAD, "*", "reason", "no JSON", "message", b"\x00 odd")
    return added.decode()


def waiting(connection: Connection, lane: str = topology.LANE) -> list[str]:
    return [wire.read_envelope(each).headers.id for each in connection.call("LRANGE", lane, 0, -1)[::-1]]
