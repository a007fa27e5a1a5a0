"""From a claimed message to a job, several of a bundle, or to why it is none. Pure: the router moves the messages."""

from __future__ import annotations

import msgspec

from lepton_ai import results, wire
from lepton_ai.bundle import ids_of
from lepton_ai.errors import InvalidArguments, JobCancelled, JobExpired, LeptonError
from lepton_ai.job import LATEST_S, Options
from queues.steps import Outcome

__all__ = ["Dead", "Incoming", "Refused", "cancelled", "expired", "read", "refused"]


class Incoming(msgspec.Struct, frozen=True):
    """A job that may be placed, once it is due and before its deadline (seconds since the epoch)."""

    options: Options
    headers: wire.Headers
    ids: tuple[str, ...]
    """Several of a bundle (lepton_ai/bundle.py)."""
    due_at: float | None = None
    deadline_at: float | None = None

    def waits_until(self, now: float) -> float | None:
        """When to look at it again; None where that is now. One whose deadline comes before it is due ends by then."""
        if self.due_at is None or self.due_at <= now:
            return None
        if self.deadline_at is None:
            return self.due_at
        return min(self.due_at, self.deadline_at) if self.deadline_at > now else None


class Refused(msgspec.Struct, frozen=True):
    """A job that this release does not run: its waiter is told why."""

    headers: wire.Headers
    outcome: Outcome
    error: LeptonError
    options: Options = Options()
    """As far as they could be read."""


class Dead(msgspec.Struct, frozen=True):
    """Bytes without a job in them."""

    reason: str


def read(message: bytes, now: float) -> Incoming | Refused | Dead:
    """What a message is at `now`, in seconds since the epoch. Never raises for what it holds."""
    try:
        envelope = wire.read_envelope(message)
    except LeptonError as error:
        names = wire.read_names(message)
        if names is None:
            return Dead(error.message)
        return Refused(names, _outcome(names.id, "failed", error, Options(), "json"), error)
    headers, options = envelope.headers, Options()
    try:
        options = wire.read_options(headers)
        ids = ids_of(message, headers, options)
        due_at, deadline_at = wire.due_at(headers), wire.deadline_at(headers)
        if due_at is not None and due_at > now + LATEST_S:
            raise InvalidArguments(f"eta {headers.eta} is more than 30 days away", "eta")
    except LeptonError as error:
        if options == Options():
            options = Options(blobs=wire.read_places(headers))
        return Refused(headers, _outcome(headers.id, "failed", error, options, "json"), error, options)
    if options.priority is None and (priority := _celery_priority(envelope.properties.priority)) is not None:
        options = msgspec.structs.replace(options, priority=priority)
    return Incoming(options, headers, ids, due_at, deadline_at)


def refused(found: Incoming, error: LeptonError) -> Refused:
    """How a job ends that this fleet does not take."""
    outcome = _outcome(found.headers.id, "failed", error, found.options, "json")
    return Refused(found.headers, outcome, error, found.options)


def cancelled(job_id: str, options: Options, serializer: str) -> Outcome:
    """How a job ends that was cancelled before a device had it."""
    return _outcome(job_id, "cancelled", JobCancelled("cancelled while it waited"), options, serializer)


def expired(job_id: str, options: Options, serializer: str) -> Outcome:
    """How a job ends whose deadline has passed before a device had it."""
    return _outcome(job_id, "expired", JobExpired("its deadline passed while it waited"), options, serializer)


def _outcome(job_id: str, status: str, error: LeptonError, options: Options, serializer: str) -> Outcome:
    record = results.encode(results.failure(job_id, error), options.result or serializer)
    return Outcome(job_id, status, record, options.reply_to or "")


def _celery_priority(step: int | None) -> int | None:
    """Our priority for kombu's, None for unset: its 9 is the lowest, and its 0 is also what it writes for unset."""
    if not step:
        return None
    return next((ours for least, ours in ((9, 1), (6, 2), (3, 3)) if step >= least), None)
