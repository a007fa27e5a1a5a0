"""Arrays outside their messages: a group's References become what its kernel gets, just before it runs."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from typing import Any

import msgspec
from numpy.typing import NDArray

from lepton_ai import blob
from lepton_ai.blob import InRedis, InStore, Reference
from lepton_ai.errors import BlobLost, InvalidArguments, LeptonError
from lepton_ai.ring import RingReader
from queues.connection import Connection
from tasks.batching import TakenJob

__all__ = ["Fetched", "fetch"]


class Fetched(msgspec.Struct):
    """What came of the jobs of a group."""

    jobs: list[TakenJob]
    """Those whose arrays are there, with them."""
    failed: list[tuple[TakenJob, LeptonError]]
    from_broker_bytes: int


def fetch(
    jobs: Sequence[TakenJob], connection: Connection, ring: RingReader, limit_bytes: int, stores: Sequence[str] = ()
) -> Fetched:
    """Reads what jobs have outside their messages: from shared memory in place, from broker and stores all at once.

    `stores` are the prefixes of what may be read from a store. Raises BrokerUnavailable.
    """
    start = time.perf_counter()
    arrays: dict[int, dict[str, Any]] = {}
    errors: dict[int, LeptonError] = {}
    asked: list[tuple[int, str, Reference, list[blob.Command]]] = []
    stored: list[tuple[int, str, Reference]] = []
    for at, name, reference in _references(jobs):
        try:
            place = blob.place_of(reference, name)
            if isinstance(place, InStore):
                _check_stored(place, reference, name, limit_bytes, stores)
                stored.append((at, name, reference))
            elif isinstance(place, InRedis):
                commands = blob.read_commands(reference, jobs[at].id, limit_bytes, name)
                asked.append((at, name, reference, commands))
            else:
                arrays.setdefault(at, {})[name] = ring.get(reference, limit_bytes, name)
        except LeptonError as error:
            errors.setdefault(at, error)
    from_broker_bytes = 0
    sent = connection.send([each for *_, commands in asked for each in commands]) if asked else 0
    replies = iter(connection.receive(sent))
    for at, name, reference, commands in asked:
        # A key that holds something else is one that is gone.
        found = [reply if isinstance(reply, bytes) else None for _, reply in zip(commands, replies, strict=False)]
        try:
            array = arrays.setdefault(at, {})[name] = blob.read(reference, found, name)
            from_broker_bytes += array.nbytes
        except LeptonError as error:
            errors.setdefault(at, error)
    for (at, name, _), read in zip(stored, _read_stored(stored, limit_bytes), strict=True):
        if isinstance(read, LeptonError):
            errors.setdefault(at, type(read)(read.message, name))
        else:
            arrays.setdefault(at, {})[name] = read
    each_s = (time.perf_counter() - start) / len(jobs)
    there = [_filled(job, arrays.get(at, {}), each_s) for at, job in enumerate(jobs) if at not in errors]
    return Fetched(there, [(jobs[at], error) for at, error in errors.items()], from_broker_bytes)


def _check_stored(place: InStore, reference: Reference, name: str, limit_bytes: int, stores: Sequence[str]) -> None:
    """InvalidArguments where a worker may not read this: a producer must not make it read whatever it can reach."""
    blob.layout(reference, limit_bytes, name)
    if not place.is_below(stores):
        told = f"only below {', '.join(stores)}" if stores else "nothing: LEPTON_STORES is not set there"
        raise InvalidArguments(f"{place.url} is not for workers to read; they read {told}", name)


def _read_stored(
    stored: Sequence[tuple[int, str, Reference]], limit_bytes: int
) -> Sequence[NDArray[Any] | LeptonError]:
    if not stored:
        return ()
    try:
        from lepton_ai import store  # fsspec is loaded by those who need it

        return store.read([reference for *_, reference in stored], limit_bytes)
    except Exception as error:  # noqa: BLE001 - a store's library may raise anything, and must not end the slot
        told = "".join(traceback.format_exception_only(error)).strip()
        return [BlobLost(f"{reference.blob} cannot be read: {told}") for *_, reference in stored]


def _references(jobs: Sequence[TakenJob]) -> list[tuple[int, str, Reference]]:
    return [
        (at, name, value)
        for at, job in enumerate(jobs)
        for name, value in job.inputs.items()
        if isinstance(value, Reference)
    ]


def _filled(job: TakenJob, arrays: dict[str, Any], fetch_s: float) -> TakenJob:
    """The job with these arrays, which took so long to get."""
    seen = [each for each in job.inputs.values() if isinstance(each, Reference) and each.blob.startswith("ring:")]
    return msgspec.structs.replace(
        job, inputs=job.inputs | arrays, seen=seen, outside_bytes=0, decode_s=job.decode_s + fetch_s
    )
