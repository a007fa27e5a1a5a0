"""Workers whose slots run in this process."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from lepton_ai.settings import Settings
from queues.connection import Connection
from tests.tasks.workshop import SETTINGS, MakeWorker, Worker


@pytest.fixture
def make_worker(broker_url: str, connection: Connection, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeWorker]:
    """Makes workers whose slots run, and drains them at the end."""
    monkeypatch.setattr("tasks.slots._TAKE_S", 0.05)
    workers: list[Worker] = []

    def make(slots: int = 1, settings: Settings = SETTINGS, *, start: bool = True) -> Worker:
        workers.append(Worker(broker_url, connection, slots, settings))
        if start:
            workers[-1].slots.start()
        return workers[-1]

    yield make
    for worker in workers:
        for gate in (worker.shop.gate, *worker.shop.gates.values()):
            gate.set()
        drained = threading.Thread(target=worker.slots.drain, daemon=True)
        drained.start()
        drained.join(5)
        assert not drained.is_alive(), "the slots do not end"


@pytest.fixture
def worker(make_worker: MakeWorker) -> Worker:
    return make_worker()
