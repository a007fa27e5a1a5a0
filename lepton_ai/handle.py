"""What a submitter holds: the handle of one job."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, Protocol

import msgspec

from lepton_ai.card import card
from lepton_ai.errors import JobCancelled, JobExpired, LeptonError, ResultTimeout, from_wire
from lepton_ai.event import CloudEvent
from lepton_ai.job import ENDED, FINAL_STATES, Meta, Placement, Record, state_of

__all__ = ["Handle", "JobHandle", "JobReader", "joined"]


class Handle:
    """What the handles of both clients know without asking anybody."""

    __slots__ = ("__weakref__", "id", "kernel", "meta", "row")

    def __init__(self, job_id: str, kernel: str | None, row: int | None = None) -> None:
        self.id = job_id
        self.kernel = kernel
        #: The number of its row, from 0, where a `map` submitted it.
        self.row = row
        #: The final record, once this process has seen it.
        self.meta: Meta | None = None

    def _outcome(self, meta: Meta) -> Mapping[str, Any]:
        """The outputs of a job that has ended, or its error raised."""
        if meta.status == "SUCCESS":
            return meta.result  # type: ignore[no-any-return]
        if meta.status == "REVOKED":
            if state_of(meta, None) == "expired":
                told = str(_wire_error(meta).get("message") or "its deadline passed before it was run")
                raise JobExpired(f"job {self.id} has expired: {told}")
            raise JobCancelled(f"job {self.id} was cancelled")
        raise from_wire(_wire_error(meta))

    def _ended_after_all(self, timeout_s: float | None, meta: Meta | None, placement: Placement | None) -> Meta:
        """The record that is known after a wait in vain; else ResultTimeout with what is known."""
        if meta is not None and meta.status in FINAL_STATES:
            return meta
        state = state_of(meta, placement)
        told = ""
        if state == "waiting":
            told = " (no router has placed it yet: is one running?)"
        elif state in ("parked", "scheduled") and placement is not None:
            told = f" ({placement.reason})"
        raise ResultTimeout(f"job {self.id} is {state} after {timeout_s} s{told}; call result() again to wait on")

    def _known_record(self) -> Record | None:
        """The record, where nobody has to be asked for it."""
        record = self.meta.record if self.meta is not None else None
        return record if record is not None and record.placement is not None else None

    def _joined(self, meta: Meta | None, placement: Placement | None) -> Record:
        """The record that was looked up; of a job that we have seen end, it is not looked up again."""
        record = joined(meta or self.meta, placement)  # what is stored may have expired
        if self.meta is not None and meta is not None and record.placement is not None:
            self.meta = msgspec.structs.replace(meta, lepton=record)
        return record

    def _card(self, meta: Meta | None, placement: Placement | None, note: str = "") -> str:
        record = joined(meta, placement)
        if meta is not None and meta.status == "FAILURE":
            record = msgspec.structs.replace(record, error=_wire_error(meta))
        state = state_of(meta, placement) if meta is not None or not note else "of unknown state"
        return card(self.id, self.kernel, state, record, note)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.kernel or ''}>"


class JobReader(Protocol):
    """Where a handle looks its job up: the broker, or an HTTP ingest."""

    def wait(self, job: JobHandle, timeout_s: float | None) -> Meta | None:
        """The final record of a job, or None if it does not come in time."""

    def look(self, job_id: str) -> tuple[Meta | None, Placement | None]:
        """What is known of a job now."""

    def cancel(self, job_id: str) -> bool:
        """Asks for a job to be cancelled; False where it has ended."""

    def follow(self, job_id: str, timeout_s: float | None) -> Generator[CloudEvent, None, None]:
        """A job's events, from its first to its last."""


class JobHandle(Handle):
    """One submitted job. Cheap; may be dropped, and made again from the id by `client.job(id)`."""

    __slots__ = ("_reader",)

    def __init__(self, job_id: str, kernel: str | None, reader: JobReader, row: int | None = None) -> None:
        super().__init__(job_id, kernel, row)
        self._reader = reader

    def result(self, timeout: float | None = None) -> Mapping[str, Any]:
        """The outputs by name, arrays where arrays were sent.

        Raises the job's own error (the class that its code names: KernelFailed, TimeLimitExceeded, JobDead where it
        is among the dead letters), JobCancelled, JobExpired where its deadline has passed, or ResultTimeout after
        `timeout` seconds; the job goes on after a timeout, and `result` may be called again.
        """
        if self.meta is None:
            self.meta = self._reader.wait(self, timeout)
        if self.meta is None:
            self.meta = self._ended_after_all(timeout, *self._reader.look(self.id))
        return self._outcome(self.meta)

    @property
    def state(self) -> str:
        """waiting, scheduled, placed, parked, succeeded, failed, cancelled or expired."""
        meta, placement = (self.meta, None) if self.meta else self._reader.look(self.id)
        return state_of(meta, placement)

    @property
    def done(self) -> bool:
        return self.state in ENDED

    def why(self) -> Placement | None:
        """Where the job went and why, with every device that was looked at; None while it waits for a router."""
        return self.record().placement

    def record(self) -> Record:
        """The placement, and once the job has ended, what it really cost or the error it ended with."""
        return self._known_record() or self._joined(*self._reader.look(self.id))

    def cancel(self) -> bool:
        """Asks for the job to be cancelled: see `Client.cancel`."""
        return self.meta is None and self._reader.cancel(self.id)

    def events(self, *, timeout: float | None = None) -> Generator[CloudEvent, None, None]:
        """The job's events from its first, as they come; ends after its last, or after `timeout` seconds without one.

        Ends too where the job has ended and its last event is no longer kept; an event of the type
        `io.lepton.events.missed.v1` comes first where earlier ones are not. As with `Client.events`, close the
        iterator or drop it where you leave it early.
        """
        return self._reader.follow(self.id, timeout)

    def _repr_html_(self) -> str:
        """A card for notebooks: where the job went, what was expected of each device, and what it really cost."""
        try:
            meta, placement = (self.meta, None) if self._known_record() else self._reader.look(self.id)
        except (LeptonError, msgspec.MsgspecError) as error:
            return self._card(self.meta, None, f"nothing can be looked up: {error}")
        return self._card(self.meta or meta, placement)


def joined(meta: Meta | None, placement: Placement | None) -> Record:
    """A job's record: what stands beside its result, and the placement where that is kept apart."""
    record = meta.record if meta is not None else None
    if record is None:
        return Record(placement=placement)
    return record if record.placement else msgspec.structs.replace(record, placement=placement)


def _wire_error(meta: Meta) -> Any:
    if (record := meta.record) is not None and record.error is not None:
        return record.error
    result = meta.result if isinstance(meta.result, dict) else {"exc_message": meta.result}
    return {"code": "job_failed", "message": f"{result.get('exc_type', 'error')}: {result.get('exc_message')}"}
