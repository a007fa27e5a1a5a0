"""The card that a notebook shows for a job."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest

from lepton_ai import AsyncJobHandle, JobHandle, results
from lepton_ai.errors import (
    BrokerUnavailable,
    InvalidArguments,
    JobCancelled,
    JobDead,
    JobExpired,
    KernelFailed,
    LeptonError,
    ResultTimeout,
    TimeLimitExceeded,
)
from lepton_ai.job import Candidate, Cost, Estimate, Meta, Placement, Record
from lepton_ai.remote_protocol import JobView, final_meta

PLACEMENT = Placement(
    "job",
    "linalg.matmul",
    "placed",
    "it finishes there first",
    1.0,
    "router",
    "cpu.big",
    candidates=(
        Candidate("cpu.big", Estimate(0.001, 0.0025, 0.25)),
        Candidate("cpu.little", excluded="pinned to cpu.big"),
    ),
)
COST = Cost("cpu.big@host", "cpu.big", 0.5, 0.125, 1.0, 4)


class Knows:
    """A reader that knows what it was given."""

    def __init__(self, meta: Meta | None = None, placement: Placement | None = None) -> None:
        self.known = meta, placement

    def look(self, job_id: str) -> Any:
        return self.known


class Away:
    def __init__(self, error: LeptonError) -> None:
        self.error = error

    def look(self, job_id: str) -> Any:
        raise self.error


class Seen(HTMLParser):
    """The texts of a page by row, and its tags; a tag that is not closed fails."""

    def __init__(self, html: str) -> None:
        super().__init__()
        rows: list[list[str]] = [[]]
        self._rows = rows
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open
        self.rows = [row for row in rows if row]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self._open.append(tag)
        if tag in {"tr", "div"}:
            self._rows.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self._rows[-1].append(data.strip())


def card(reader: Any, meta: Meta | None = None, kernel: str | None = "linalg.matmul") -> Seen:
    job = JobHandle("job", kernel, reader)
    job.meta = meta
    return Seen(job._repr_html_())


def test_a_job_that_waits_is_a_card_of_one_line() -> None:
    assert card(Knows()).rows == [["linalg.matmul", "waiting", "job"]]


def test_a_placed_job_shows_every_device_that_was_looked_at_in_milliseconds() -> None:
    assert card(Knows(None, PLACEMENT), kernel=None).rows == [
        ["linalg.matmul", "placed", "on", "cpu.big", "job"],
        ["it finishes there first"],
        ["device", "wait ms", "transfer ms", "run ms", "finish ms"],
        ["cpu.big", "1", "2.5", "250", "254"],
        ["cpu.little", "pinned to cpu.big"],
    ]


def test_a_job_that_has_ended_shows_what_it_really_cost() -> None:
    meta = results.success("job", {"c": 1}, Record(PLACEMENT, COST))
    for found in (card(Knows(), meta), card(Knows(meta))):
        assert found.rows[0] == ["linalg.matmul", "succeeded", "on", "cpu.big", "job"]
        assert found.rows[-1] == ["really", "500", "125", "1,000", "1,625"]


@pytest.mark.parametrize("record", [None, Record(PLACEMENT, COST)])
def test_a_failed_job_shows_its_error(record: Record | None) -> None:
    meta = results.failure("job", KernelFailed("ZeroDivisionError: by nought"), record=record)
    found = card(Knows(), meta)
    assert found.rows[0][:2] == ["linalg.matmul", "failed"]
    assert found.rows[-1] == ["kernel_failed", ": ZeroDivisionError: by nought"]


def test_a_failure_that_celery_stored_shows_its_words() -> None:
    found = card(Knows(Meta("FAILURE", {"exc_type": "WorkerLostError", "exc_message": "killed"}, task_id="job")))
    assert found.rows[-1] == ["job_failed", ": WorkerLostError: killed"]


def test_a_cancelled_job_says_so() -> None:
    assert card(Knows(results.failure("job", JobCancelled("revoked")))).rows[0][:2] == ["linalg.matmul", "cancelled"]


@pytest.mark.parametrize("error", [BrokerUnavailable("nobody <there>"), InvalidArguments("not a result")])
def test_a_card_says_that_nothing_could_be_looked_up(error: LeptonError) -> None:
    found = card(Away(error))
    assert found.rows[0] == ["linalg.matmul", "of unknown state", "job"]
    assert found.rows[1] == [f"nothing can be looked up: {error.message}"]


def test_what_was_seen_is_shown_while_the_broker_is_away() -> None:
    found = card(Away(BrokerUnavailable("away")), results.failure("job", KernelFailed("it broke")))
    assert found.rows[0][:2] == ["linalg.matmul", "failed"]
    assert [": it broke" in row for row in found.rows].count(True) == 1


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", "' onload='x", '"><img src=x>', "&amp;", "<b>"])
def test_nothing_that_stands_in_a_card_is_taken_for_html(evil: str) -> None:
    told = Placement(
        evil,
        evil,
        evil,
        evil,
        1.0,
        evil,
        evil,
        candidates=(Candidate(evil, Estimate(0, 0, 0)), Candidate(evil, excluded=evil)),
    )
    record = Record(told, Cost(evil, evil, 0, 0, 0, 1), {"code": evil, "message": evil})
    job = JobHandle(evil, evil, Knows(None, told))  # type: ignore[arg-type]
    waiting = Seen(job._repr_html_())
    job.meta = Meta("FAILURE", {}, task_id=evil, lepton=record)
    for found in (waiting, Seen(job._repr_html_())):
        assert found.tags <= {"div", "b", "i", "span", "code", "table", "tr", "td", "th"}
        assert found.attributes <= {"style", "colspan"}
        assert sum(evil in "".join(row) for row in found.rows) >= 4


def test_a_card_on_an_event_loop_shows_what_was_seen_and_asks_nobody() -> None:
    job = AsyncJobHandle("job", "a.b", None)  # type: ignore[arg-type]
    assert "await" in job._repr_html_()
    job.meta = results.success("job", {"c": 1}, Record(PLACEMENT, COST))
    assert Seen(job._repr_html_()).rows[0][:2] == ["a.b", "succeeded"]
    assert "await" not in job._repr_html_()
    job.meta = results.success("job", {"c": 1}, Record(cost=COST))
    assert "await job.record()" in job._repr_html_()


# -- why --------------------------------------------------------------------------------------------------------------


class Counts(Knows):
    """A reader that counts how often it was asked."""

    asked = 0

    def look(self, job_id: str) -> Any:
        self.asked += 1
        return super().look(job_id)


def test_a_placement_that_is_kept_apart_from_the_result_is_looked_up_once() -> None:
    ended = results.success("job", {"c": 1}, Record(cost=COST))
    reader = Counts(ended, PLACEMENT)
    job = JobHandle("job", "a.b", reader)  # type: ignore[arg-type]
    job.meta = ended
    assert (job.why(), job.why(), job.record()) == (PLACEMENT, PLACEMENT, Record(PLACEMENT, COST))
    assert reader.asked == 1


def test_what_was_seen_of_a_job_is_told_after_its_result_has_expired() -> None:
    job = JobHandle("job", "a.b", Knows())  # type: ignore[arg-type]
    job.meta = results.success("job", {"c": 1}, Record(cost=COST))
    assert job.record() == Record(cost=COST)


# -- how a job ends ---------------------------------------------------------------------------------------------------

ENDINGS = [
    (JobCancelled("somebody asked for it"), "REVOKED", "cancelled"),
    (JobExpired("its deadline was 12:00"), "REVOKED", "expired"),
    (JobDead("it killed 3 workers"), "FAILURE", "failed"),
    (TimeLimitExceeded("it ran longer than 5 s"), "FAILURE", "failed"),
    (KernelFailed("boom"), "FAILURE", "failed"),
]


@pytest.mark.parametrize(("error", "status", "state"), ENDINGS, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("way", ["json", "msgpack", "http"])
def test_an_end_is_the_same_error_and_state_for_everybody(
    error: LeptonError, status: str, state: str, way: str
) -> None:
    meta: Meta | None = results.failure("job", error)
    assert meta is not None
    assert meta.status == status
    if way == "http":
        meta = final_meta(JobView("job", "a.b", state, error=error.to_wire()))
    else:
        meta = results.read(results.encode(meta, way))
    assert meta is not None
    job = JobHandle("job", "a.b", Knows(meta))
    job.meta = meta
    assert (job.state, job.done) == (state, True)
    with pytest.raises(type(error)) as raised:
        job.result()
    assert type(raised.value) is type(error)
    if not isinstance(error, JobCancelled):
        assert error.message in raised.value.message


def test_a_job_that_is_due_later_says_when() -> None:
    placement = Placement("job", "a.b", "scheduled", "it is due at noon", 1.0, "router")

    class Scheduled(Knows):
        def wait(self, job: Any, timeout_s: float | None) -> None:
            return None

    job = JobHandle("job", "a.b", Scheduled(None, placement))
    assert (job.state, job.done) == ("scheduled", False)
    with pytest.raises(ResultTimeout, match=r"is scheduled .* due at noon"):
        job.result(timeout=0)
