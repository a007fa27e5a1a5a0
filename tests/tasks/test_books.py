from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery.worker import control, state

from lepton_ai.device import Announcement, Peaks
from lepton_ai.event import Event
from lepton_ai.settings import Settings
from tasks.books import Books, install_commands
from tasks.runner import Ending

DEVICE = "cpu.test"


class Told:
    """A Teller that only remembers."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def tell(self, events: Any) -> None:
        self.events += events


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def books(told: Told) -> Iterator[Books]:
    state.reset_state()
    yield Books(SimpleNamespace(backend=None), "cpu@host", DEVICE, "worker-1", told)  # type: ignore[arg-type]
    state.reset_state()


def test_celery_sees_what_is_taken_what_runs_and_what_is_gone(books: Books) -> None:
    books.taken([("one", "a.b"), ("two", "a.b"), ("three", "c.d")], set())
    books.started(["one"])
    assert {request.id for request in state.reserved_requests} == {"one", "two", "three"}
    assert {request.id for request in state.active_requests} == {"one"}
    assert (state.all_total_count, state.total_count) == ([3], {"a.b": 2, "c.d": 1})
    (active,) = state.active_requests
    assert active.info()["time_start"] > 0
    assert active.info()["delivery_info"]["routing_key"] == "lepton.cpu.test"
    books.ended([Ending("one", "succeeded", 1.0)])
    books.lost(["two", "unknown"])
    assert {request.id for request in state.reserved_requests} == {"three"}
    assert set(state.active_requests) == set()


def test_whoever_asks_for_a_job_by_its_id_is_told_where_it_stands(
    books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control.Panel, "data", dict(control.Panel.data))
    announcement = Announcement(
        "worker-1", "cpu@host", DEVICE, "cpu", 1, False, Peaks(1.0, 1.0, 1.0, 0.0, 0.0), (), 0.0
    )
    install_commands(Settings(), "redis://nowhere", announcement, books)
    books.taken([("one", "a.b"), ("two", "a.b")], set())
    books.started(["one"])
    found = control.Panel.data["query_task"](None, ["one", "two", "unknown"])
    assert {job: (where, info["name"]) for job, (where, info) in found.items()} == {
        "one": ("active", "a.b"),
        "two": ("reserved", "a.b"),
    }


def test_celerys_own_tidying_takes_nothing_out_of_what_the_slots_hold(books: Books) -> None:
    """As celery.worker.consumer does whenever it has lost its connection."""
    books.taken([("one", "a.b"), ("two", "a.b")], set())
    books.started(["one"])
    (active,) = tuple(state.active_requests)
    assert active in state.reserved_requests
    state.reserved_requests.clear()
    state.reserved_requests.update((active,))
    assert {request.id for request in state.reserved_requests - state.active_requests} == {"two"}
    assert (len(state.reserved_requests), len(state.active_requests)) == (2, 1)


def test_a_shown_job_is_told_from_its_receipt_to_its_end(books: Books, told: Told) -> None:
    books.taken([("one", "a.b"), ("hidden", "a.b"), ("bad", "a.b"), ("gone", "a.b")], {"one", "bad", "gone"})
    books.started(["one", "hidden"])
    books.ended(
        [
            Ending("one", "succeeded", 5.0, 0.25, "c=float32[1]"),
            Ending("hidden", "succeeded", 5.0),
            Ending("bad", "failed", 6.0, error="KernelFailed('x')", trace="Traceback"),
            Ending("gone", "cancelled", 7.0),
        ]
    )
    kinds = [(event["type"], event["uuid"]) for event in told.events]
    assert kinds == [
        *(("task-received", job) for job in ("one", "bad", "gone")),
        ("task-started", "one"),
        ("task-succeeded", "one"),
        ("task-failed", "bad"),
        ("task-revoked", "gone"),
    ]
    assert told.events[0]["name"] == "a.b"
    assert (told.events[4]["runtime"], told.events[4]["result"]) == (0.25, "c=float32[1]")
    assert (told.events[5]["exception"], told.events[5]["traceback"]) == ("KernelFailed('x')", "Traceback")


def test_a_job_that_was_shown_once_is_not_shown_for_ever(books: Books, told: Told) -> None:
    books.taken([("one", "a.b")], {"one"})
    books.lost(["one"])
    told.events.clear()
    books.taken([("one", "a.b")], set())
    books.started(["one"])
    books.ended([Ending("one", "succeeded", 5.0)])
    assert told.events == []


def test_progress_is_an_event_of_ours(books: Books, told: Told) -> None:
    books.progressed(["one", "two"], "a.b", 0.5)
    assert told.events == [Event("job.progressed", "worker-1", "a.b", DEVICE, ("one", "two"), data={"fraction": 0.5})]


def test_a_revoked_job_is_known_as_such(books: Books) -> None:
    books.revoke({"one"})
    books.revoke(set())
    assert books.is_revoked("one")
    assert not books.is_revoked("two")


def test_the_sets_can_be_looked_through_while_slots_change_them(books: Books) -> None:
    """Celery's own raise: Set changed size during iteration."""
    stop = threading.Event()

    def change() -> None:
        number = 0
        while not stop.is_set():
            jobs = [(f"{number}-{at}", "a.b") for at in range(64)]
            books.taken(jobs, set())
            books.started([job for job, _ in jobs])
            books.lost([job for job, _ in jobs])
            number += 1

    slots = [threading.Thread(target=change) for _ in range(2)]
    for slot in slots:
        slot.start()
    try:
        for _ in range(3000):
            # As celery.worker.control.reserved does.
            for request in set(state.reserved_requests) - set(state.active_requests):
                request.info()
    finally:
        stop.set()
        for slot in slots:
            slot.join()
    assert len(state.reserved_requests) == 0
    assert state.all_total_count[0] == sum(state.total_count.values())
