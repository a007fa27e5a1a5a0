"""What a router ends or puts aside itself: jobs that are refused, cancelled, expired, or not due yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec
import structlog

from lepton_ai import blob, event, results
from lepton_ai.errors import Overloaded
from lepton_ai.event import Event
from lepton_ai.identity import minute_of
from lepton_ai.job import Options, Placement
from lepton_ai.settings import Settings
from lepton_ai.succession import PUT_OFF_S
from pipeline import intake
from pipeline.cluster import Cluster
from pipeline.intake import Dead, Incoming, Refused
from pipeline.node import Narrator
from pipeline.sequels import Sequels
from pipeline.window import Claim, ClaimedJob, Window
from queues.broker import Broker, Kind
from queues.steps import DeadLetter, Dispatch, Outcome

__all__ = ["Endings", "leave", "noted_in"]

#: How a job ends that never reaches a device, and the event that tells of it.
_ENDINGS = {"failed": "job.rejected", "cancelled": "job.cancelled", "expired": "job.expired"}
_MSGPACK = msgspec.msgpack.Encoder()

log = structlog.get_logger()


class Endings:
    """Takes jobs out of a router's window that no device is to have, at least not now. Used by the router's thread."""

    def __init__(
        self,
        broker: Broker,
        window: Window,
        cluster: Cluster,
        narrator: Narrator,
        sequels: Sequels,
        settings: Settings,
    ) -> None:
        self._broker = broker
        self._window = window
        self._cluster = cluster
        self._narrator = narrator
        self._sequels = sequels
        self._settings = settings

    def refuse(self, claim: Claim, refused: Sequence[tuple[bytes, Refused | Dead]]) -> None:
        """Ends what nobody can run, each with its message: a job is told why, what is none is a dead letter."""
        step = Dispatch({}, {})
        jobs = [(message, each) for message, each in refused if isinstance(each, Refused)]
        for message, each in refused:
            if isinstance(each, Dead):
                step.dead.append(DeadLetter("", "", "unreadable", each.reason, 0, message))
        step.rejected = [each.outcome for _, each in jobs]
        step.blobs = {each.outcome.job: found for _, each in jobs if (found := _blobs(each.headers.id, each.options))}
        step.told = self._narrator.ended([(each.headers, each.error) for _, each in jobs], [])
        leaving = [(claim, message) for message, _ in refused]
        self._end(step, leaving, [message for message, _ in jobs])
        self._window.forget(leaving)

    def schedule(self, claim: Claim, early: Sequence[tuple[bytes, Incoming, float]]) -> None:
        """Puts jobs aside until they are due."""
        step = Dispatch({}, {}, leaving={}, placements={}, scheduled=[])
        leaving = [(claim, message) for message, _, _ in early]
        leave(step, leaving)
        events = []
        now = self._broker.now()
        for message, each, due_at in early:
            job, kernel = each.headers.id, each.headers.task
            step.scheduled.append((job, due_at, message))
            reason = f"waits until it is due, {each.headers.eta}"
            placement = Placement(job, kernel, "scheduled", reason, now, self._broker.incarnation)
            step.placements.setdefault(noted_in(job, now), {})[job] = _MSGPACK.encode(placement)
            data = {"due_at": due_at}
            events.append(Event("job.scheduled", self._broker.incarnation, kernel, jobs=(job,), data=data))
        step.event = event.encode(*events)
        self._broker.dispatch(step)
        self._window.forget(leaving)

    def cancel(self, jobs: Sequence[ClaimedJob]) -> None:
        """Ends jobs of the window that were cancelled."""
        self._give_up(jobs, intake.cancelled)

    def expire(self, jobs: Sequence[ClaimedJob]) -> None:
        """Ends jobs of the window whose deadline has passed, unless they have been cancelled a moment ago."""
        if not jobs:
            return
        waiting = set(self._window.jobs())
        self._give_up([job for job in jobs if job in waiting], intake.expired)

    def _give_up(self, jobs: Sequence[ClaimedJob], how: Callable[[str, Options, str], Outcome]) -> None:
        if not jobs:
            return
        serializer = self._settings.result_serializer
        step = Dispatch({}, {}, leaving={}, rejected=[how(job.id, job.options, serializer) for job in jobs])
        step.blobs = {job.id: found for job in jobs if (found := _blobs(job.id, job.options))}
        step.told = self._narrator.ended([], jobs, expired=how is intake.expired)
        self._end(step, [(job.claim, job.message) for job in jobs], [job.message for job in jobs])
        self._window.left(jobs)
        for job in jobs:
            self._cluster.finished(job.id)  # it may have come back from a device that died

    def _end(self, step: Dispatch, leaving: Sequence[tuple[Claim, bytes]], messages: Sequence[bytes]) -> None:
        """Takes messages out of their claims for good, with the outcomes that are in the step, each of its message.

        A job that has its result already (its message came twice) keeps that, and nobody is told of a second.
        """
        leave(step, leaving)
        before = self._broker.ended([outcome.job for outcome in step.rejected])
        rejected, step.rejected = step.rejected, []
        for outcome, message in zip(rejected, messages, strict=True):
            try:
                if outcome.job not in before:
                    step.sequels[outcome.job] = self._sequels.after(message, results.read(outcome.record))
                step.rejected.append(outcome)
            except Overloaded:  # no memory for what follows it: it ends later, and the others now
                step.scheduled.append((outcome.job, self._broker.now() + PUT_OFF_S, message))
        events = []
        for status, kind in _ENDINGS.items():
            jobs = tuple(each.job for each in step.rejected if each.status == status and each.job not in before)
            data = {"dead": len(step.dead)} if status == "failed" else {}
            if jobs or data.get("dead"):
                events.append(Event(kind, self._broker.incarnation, jobs=jobs, data=data))
                log.info("jobs_ended", how=status, jobs=len(jobs), **data)
        step.event = event.encode(*events)
        self._broker.dispatch(step)


def _blobs(job: str, options: Options) -> list[str]:
    return blob.keys(job, options.blobs or ())


def leave(step: Dispatch, leaving: Iterable[tuple[Claim, bytes]]) -> None:
    """Notes in a step which claims these messages leave, and what stays in each."""
    by_claim: dict[str, tuple[Claim, list[bytes]]] = {}
    for claim, message in leaving:
        if (found := by_claim.get(claim.key)) is None:
            found = by_claim[claim.key] = (claim, [])
        found[1].append(message)
    step.are_oldest = True
    for key, (claim, messages) in by_claim.items():
        if claim.kind is Kind.NEW:  # from here on they are counted
            step.counts["accepted"] = step.counts.get("accepted", 0) + len(messages)
        gone = set(map(id, messages))
        step.claims[key] = len(claim.messages)
        step.leaving[key] = [each for each in claim.messages if id(each) in gone]
        step.rests[key] = [each for each in claim.messages if id(each) not in gone]
        step.are_oldest &= all(id(each) in gone for each in claim.messages[: len(gone)])


def noted_in(job: str, now: float) -> int:
    """The minute in whose hash a job's placement stands; a foreign id carries none."""
    return minute_of(job) or int(now) // 60
