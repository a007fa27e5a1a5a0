"""From a claimed message to a job, or to why it is none. Pure: the router moves the messages."""

from __future__ import annotations

import msgspec

from lepton_ai import wire
from lepton_ai.errors import JobCancelled, LeptonError, OptionNotSupported
from lepton_ai.job import Options
from queues.broker import Outcome

__all__ = ["Dead", "Incoming", "Refused", "cancelled", "read"]


class Incoming(msgspec.Struct, frozen=True):
    """A job that may be placed."""

    options: Options
    headers: wire.Headers


class Refused(msgspec.Struct, frozen=True):
    """A job that this release does not run: its waiter is told why."""

    headers: wire.Headers
    outcome: Outcome
    error: LeptonError


class Dead(msgspec.Struct, frozen=True):
    """Bytes without a job in them."""

    reason: str


def read(message: bytes) -> Incoming | Refused | Dead:
    """What a message is. Never raises for what it holds."""
    try:
        envelope = wire.read_envelope(message)
    except LeptonError as error:
        return Dead(error.message)
    headers, options = envelope.headers, Options()
    try:
        options = wire.read_options(headers)
        _check_headers(headers)
    except LeptonError as error:
        return Refused(headers, _outcome(headers.id, "failed", error, options, "json"), error)
    if options.priority is None and (priority := _celery_priority(envelope.properties.priority)) is not None:
        options = msgspec.structs.replace(options, priority=priority)
    return Incoming(options, headers)


def cancelled(job_id: str, options: Options, serializer: str) -> Outcome:
    """How a job ends that was cancelled before a device had it."""
    return _outcome(job_id, "cancelled", JobCancelled("cancelled while it waited"), options, serializer)


def _outcome(job_id: str, status: str, error: LeptonError, options: Options, serializer: str) -> Outcome:
    record = wire.encode_meta(wire.failure(job_id, error), options.result or serializer)
    return Outcome(job_id, status, record, options.reply_to or "")


def _check_headers(headers: wire.Headers) -> None:
    """What Celery's clients may ask for and this release does not do is refused, never ignored."""
    if headers.eta is not None:
        raise OptionNotSupported("eta and countdown are not supported yet", "eta")
    if headers.timelimit is not None and any(limit is not None for limit in headers.timelimit):
        raise OptionNotSupported("time limits are not supported yet", "timelimit")


def _celery_priority(step: int | None) -> int | None:
    """Our priority for kombu's, None for unset: its 9 is the lowest, and its 0 is also what it writes for unset."""
    return next((ours for least, ours in ((9, 1), (6, 2), (3, 3)) if step is not None and step >= least), None)
