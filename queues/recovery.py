"""Recovery: what a holder without a lease still holds goes back; who was alone when it died counts an attempt.

Every router sweeps once a heartbeat. The decision and the move are one server function, so it does not matter how many
of them do it at once (`sweep` and `recover` in functions.lua).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

import msgspec

from lepton_ai import blob, event, results, wire
from lepton_ai.errors import JobDead, LeptonError, Overloaded
from lepton_ai.event import Event
from lepton_ai.job import Meta, Options
from lepton_ai.settings import Settings
from lepton_ai.succession import FollowUps
from queues import functions
from queues.connection import Command, Connection

__all__ = ["LISTS_EACH", "Recovered", "Sequels", "give_back", "recover"]

#: Claims of one kind that one router may have open, and slots that one worker may have.
LISTS_EACH = 64
#: So many heartbeats without a sweep, and every holder gets a whole lease before anything is recovered.
_GAP_BEATS = 3


#: What a job sets off that ends with this record: its message, the record.
Sequels = Callable[[bytes, Meta], FollowUps]


class Recovered(msgspec.Struct, frozen=True):
    """What a sweep has moved."""

    messages: int = 0
    dead: int = 0
    """Jobs among them that are dead letters now."""


def recover(connection: Connection, incarnation: str, settings: Settings, sequels: Sequels) -> Recovered:
    """Gives back what lapsed holders still hold; `incarnation` is looked after even if it was forgotten."""
    gap_ms, lease_ms = round(_GAP_BEATS * settings.heartbeat_s * 1000), round(settings.lease_s * 1000)
    lapsed = connection.call(*functions.call("sweep", (), (gap_ms, lease_ms, LISTS_EACH, incarnation)))
    commands = [
        _command(connection, name.decode(errors="replace"), only.decode(errors="replace"), settings, sequels)
        for name, _, only in lapsed
    ]
    found = connection.many(commands) if commands else []
    return Recovered(sum(moved for moved, _ in found), sum(dead for _, dead in found))


def give_back(connection: Connection, incarnation: str) -> int:
    """Gives back what a holder that leaves in good order still holds, its lease given up; nobody is suspected."""
    moved, _ = connection.call(*functions.call("recover", (), (incarnation, LISTS_EACH, "left", "")))
    return int(moved)


def _command(connection: Connection, incarnation: str, only: str, settings: Settings, sequels: Sequels) -> Command:
    suspect: Sequence[Any] = ("",)
    if only and (messages := connection.call("LRANGE", only, -1, -1)):
        with suppress(Overloaded):  # no memory for what follows it: it comes back alone, and may die once more
            suspect = _suspect(only, messages[0], incarnation, settings, sequels)
    return functions.call("recover", (), (incarnation, LISTS_EACH, "died", *suspect))


def _suspect(held: str, message: bytes, incarnation: str, settings: Settings, sequels: Sequels) -> Sequence[Any]:
    """What is needed to end a job for good, whether or not this death was its last."""
    attempts = settings.attempts
    try:
        headers = wire.read_envelope(message).headers
    except LeptonError:
        return ("",)  # no job: whoever takes it says so, and it never runs
    job, kernel = headers.id, headers.task
    try:
        options = wire.read_options(headers)
    except LeptonError:
        options = Options(blobs=wire.read_places(headers))
    if options.bundle is not None:
        return ("",)  # none of its jobs was alone: each comes back alone
    error = JobDead(f"{attempts} times the worker died while this job ran with nothing beside it")
    meta = results.failure(job, error)
    follow_ups = sequels(message, meta)
    record = results.encode(meta, options.result or settings.result_serializer)
    told = event.encode(
        Event("job.dead", incarnation, kernel, jobs=(job,), data=error.to_wire() | {"attempts": attempts})
    )
    ttl_s = max(1, round(settings.result_ttl_s))
    blobs = blob.keys(job, options.blobs or ())
    return (
        held,
        message,
        *(attempts, ttl_s, settings.events_kept, settings.dead_bytes),
        *(job, kernel, error.message, record, options.reply_to or "", told),
        *(blob.LETTER_S, len(blobs), *blobs),
        follow_ups.chord_part or b"",
        *chain.from_iterable(follow_ups.pushes),
    )
