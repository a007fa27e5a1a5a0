"""Jobs as the broker knows them, and as `/v1/jobs` shows them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import msgspec

from lepton_ai import topology, wire
from lepton_ai.direct_protocol import noted_as, read_look, read_note
from lepton_ai.errors import BrokerUnavailable, LeptonError, UnknownJob
from lepton_ai.identity import minute_of
from lepton_ai.job import FINAL_STATES, Meta, Placement, Record, state_of
from lepton_ai.remote import JobView
from pipeline.ingest.redispy import broker_errors

__all__ = ["Found", "Known", "find", "placed", "view"]

#: How many minutes of placements back a foreign id (one that carries no minute) is looked for.
_MINUTES_BACK: Final = 60

Known = tuple[Meta | None, Placement | None]
#: What is stored of a job; UnknownJob where that is none of ours.
Found = Known | UnknownJob


async def find(client: Any, ids: Sequence[str]) -> dict[str, Found]:
    """What the broker knows of each of these jobs, in one round trip."""
    now = int(time.time()) // 60
    own = {job_id: minute for job_id in ids if (minute := minute_of(job_id)) is not None}
    foreign = [job_id for job_id in ids if job_id not in own]
    minutes = range(now, now - _MINUTES_BACK, -1) if foreign else ()
    async with broker_errors(), client.pipeline(transaction=False) as pipeline:
        for job_id in ids:
            pipeline.get(topology.result(job_id))
            pipeline.zscore(topology.ETA, job_id)
        for job_id, minute in own.items():
            pipeline.hmget(topology.jobs(minute), noted_as(job_id))
        for minute in minutes:
            pipeline.hmget(topology.jobs(minute), foreign)
        answers = await pipeline.execute()
    stored, notes = answers[: 2 * len(ids)], answers[2 * len(ids) :]
    placements: dict[str, Sequence[bytes | None]] = dict(zip(own, notes[: len(own)], strict=True))
    placements |= dict(zip(foreign, zip(*notes[len(own) :], strict=True), strict=True)) if foreign else {}
    return {
        job_id: _read(job_id, (stored[2 * at], stored[2 * at + 1], placements[job_id])) for at, job_id in enumerate(ids)
    }


async def placed(client: Any, metas: Mapping[str, Meta]) -> dict[str, Known]:
    """What is known of jobs that have ended, by their results: their placements are kept apart, in one round trip."""
    by_minute: dict[int, list[str]] = {}
    for job_id in metas:
        if (minute := minute_of(job_id)) is not None:
            by_minute.setdefault(minute, []).append(job_id)
    notes: dict[str, Any] = {}
    if by_minute:
        with suppress(BrokerUnavailable):  # the results are here, and can be told
            async with broker_errors(), client.pipeline(transaction=False) as pipeline:
                fields = {minute: [name for job in ids for name in noted_as(job)] for minute, ids in by_minute.items()}
                for minute, names in fields.items():
                    pipeline.hmget(topology.jobs(minute), names)
                for names, found in zip(fields.values(), await pipeline.execute(), strict=True):
                    notes.update(zip(names, found, strict=True))
    return {job_id: (meta, _placement(job_id, notes)) for job_id, meta in metas.items()}


def _placement(job_id: str, notes: Mapping[str, bytes | None]) -> Placement | None:
    try:
        return read_note(job_id, [notes.get(name) for name in noted_as(job_id)])
    except msgspec.DecodeError:
        return None


def _read(job_id: str, answers: Sequence[Any]) -> Found:
    try:
        meta, placement = read_look(job_id, answers)
    except (LeptonError, msgspec.DecodeError):
        return UnknownJob(f"what is stored for {job_id!r} is no job of ours", "id")
    if meta is not None and meta.status == "SUCCESS" and not isinstance(meta.result, dict):
        return UnknownJob(f"{job_id!r} is a task of Celery's own, and no job of ours", "id")
    return meta, placement


def view(job_id: str, kernel: str, meta: Meta | None, placement: Placement | None) -> JobView:
    """A job as it is shown."""
    record = meta.lepton if meta is not None else None
    if record is not None and record.placement is not None:
        placement = record.placement
    elif placement is not None and placement.state != "waiting":
        record = msgspec.structs.replace(record or Record(), placement=placement)
    found = JobView(job_id, kernel or (placement.kernel if placement else ""), state_of(meta, placement), record=record)
    if meta is None or meta.status not in FINAL_STATES:
        return found
    if meta.status == "SUCCESS":
        return msgspec.structs.replace(found, result=_outputs(meta.result))
    return msgspec.structs.replace(found, error=record.error if record is not None else None)


def _outputs(result: Mapping[str, Any] | Any) -> dict[str, Any]:
    return {name: wire.to_value(value) for name, value in result.items()}
