"""What a submitter holds: the handle of one job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from lepton_ai.errors import JobCancelled, ResultTimeout, from_wire
from lepton_ai.job import FINAL_STATES, Meta, Placement, Record, state_of

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["JobHandle", "JobReader"]


class JobReader(Protocol):
    """Where a handle looks its job up: the broker, or an HTTP ingest."""

    def wait(self, job: JobHandle, timeout_s: float | None) -> Meta | None:
        """The final record of a job, or None if it does not come in time."""

    def look(self, job_id: str) -> tuple[Meta | None, Placement | None]:
        """What is known of a job now."""


class JobHandle:
    """One submitted job. Cheap; may be dropped, and made again from the id by `client.job(id)`."""

    __slots__ = ("__weakref__", "_reader", "id", "kernel", "meta")

    def __init__(self, job_id: str, kernel: str | None, reader: JobReader) -> None:
        self.id = job_id
        self.kernel = kernel
        self._reader = reader
        #: The final record, once this process has seen it.
        self.meta: Meta | None = None

    def result(self, timeout: float | None = None) -> Mapping[str, Any]:
        """The outputs by name, arrays where arrays were sent.

        Raises the job's own error (the class that its code names), JobCancelled, or ResultTimeout after `timeout`
        seconds; the job goes on after a timeout, and `result` may be called again.
        """
        if self.meta is None:
            self.meta = self._reader.wait(self, timeout)
        meta = self.meta
        if meta is None:
            raise self._timed_out(timeout)
        if meta.status == "SUCCESS":
            return meta.result  # type: ignore[no-any-return]
        if meta.status == "REVOKED":
            raise JobCancelled(f"job {self.id} was cancelled")
        raise from_wire(_wire_error(meta))

    def _timed_out(self, timeout_s: float | None) -> ResultTimeout:
        meta, placement = self._reader.look(self.id)
        state = state_of(meta, placement)
        told = ""
        if state == "waiting":
            told = " (no router has placed it yet: is one running?)"
        elif state == "parked" and placement is not None:
            told = f" ({placement.reason})"
        return ResultTimeout(f"job {self.id} is {state} after {timeout_s} s{told}; call result() again to wait on")

    @property
    def state(self) -> str:
        """waiting, placed, parked, succeeded, failed or cancelled."""
        meta, placement = (self.meta, None) if self.meta else self._reader.look(self.id)
        return state_of(meta, placement)

    @property
    def done(self) -> bool:
        return self.state in FINAL_STATES.values()

    def why(self) -> Placement | None:
        """Where the job went and why, with every device that was looked at; None while it waits for a router."""
        return self.record().placement

    def record(self) -> Record:
        """The placement, and once the job has ended, what it really cost or the error it ended with."""
        if self.meta is not None and self.meta.lepton is not None and self.meta.lepton.placement is not None:
            return self.meta.lepton
        meta, placement = self._reader.look(self.id)
        if meta is None or meta.lepton is None:
            return Record(placement=placement)
        return meta.lepton if meta.lepton.placement else msgspec.structs.replace(meta.lepton, placement=placement)

    def __repr__(self) -> str:
        return f"<JobHandle {self.id} {self.kernel or ''}>"


def _wire_error(meta: Meta) -> Any:
    if meta.lepton is not None and meta.lepton.error is not None:
        return meta.lepton.error
    result = meta.result if isinstance(meta.result, dict) else {"exc_message": meta.result}
    return {"code": "job_failed", "message": f"{result.get('exc_type', 'error')}: {result.get('exc_message')}"}
