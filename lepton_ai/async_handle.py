"""What a submitter on an event loop holds: the handle of one job. As `JobHandle`, with awaits."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, Protocol

from lepton_ai.async_events import AsyncEvents
from lepton_ai.handle import Handle
from lepton_ai.job import ENDED, Meta, Placement, Record, state_of

__all__ = ["AsyncJobHandle", "AsyncJobReader"]


class AsyncJobReader(Protocol):
    """Where a handle looks its job up: the broker, or an HTTP ingest. As `JobReader`."""

    async def wait(self, job: AsyncJobHandle, timeout_s: float | None) -> Meta | None: ...
    async def look(self, job_id: str) -> tuple[Meta | None, Placement | None]: ...
    async def cancel(self, job_id: str) -> bool: ...
    def follow(self, job_id: str, timeout_s: float | None) -> AsyncEvents: ...


class AsyncJobHandle(Handle):
    """One submitted job; `await job` gives its result. May be dropped, and made again by `client.job(id)`.

    Any number of tasks may wait for it, and any of them be cancelled: the job and the others do not notice.
    """

    __slots__ = ("_reader",)

    def __init__(self, job_id: str, kernel: str | None, reader: AsyncJobReader, row: int | None = None) -> None:
        super().__init__(job_id, kernel, row)
        self._reader = reader

    async def result(self, timeout: float | None = None) -> Mapping[str, Any]:  # noqa: ASYNC109 - as JobHandle
        """The outputs by name, or the job's own error raised: see `JobHandle.result`."""
        if self.meta is None and (found := await self._reader.wait(self, timeout)) is not None:
            self.meta = found
        if self.meta is None:
            self.meta = self._ended_after_all(timeout, *await self._reader.look(self.id))
        return self._outcome(self.meta)

    def __await__(self) -> Generator[Any, None, Mapping[str, Any]]:
        return self.result().__await__()

    async def state(self) -> str:
        """waiting, scheduled, placed, parked, succeeded, failed, cancelled or expired."""
        meta, placement = (self.meta, None) if self.meta else await self._reader.look(self.id)
        return state_of(meta, placement)

    async def done(self) -> bool:
        """Whether the job has ended."""
        return await self.state() in ENDED

    async def why(self) -> Placement | None:
        """Where the job went and why, with every device that was looked at; None while it waits for a router."""
        return (await self.record()).placement

    async def record(self) -> Record:
        """The placement, and once the job has ended, what it really cost or the error it ended with."""
        return self._known_record() or self._joined(*await self._reader.look(self.id))

    async def cancel(self) -> bool:
        """Asks for the job to be cancelled: see `Client.cancel`."""
        return self.meta is None and await self._reader.cancel(self.id)

    def events(self, *, timeout: float | None = None) -> AsyncEvents:
        """The job's events from its first to its last: see `JobHandle.events`, and `AsyncEvents` for how to leave."""
        return self._reader.follow(self.id, timeout)

    def _repr_html_(self) -> str:
        """A card for notebooks, with what this handle has seen: nothing is looked up here."""
        note = ""
        if self._known_record() is None:
            its_result = ", and await job its result" if self.meta is None else ""
            note = f"await job.record() looks up where it went{its_result}"
        return self._card(self.meta, None, note)
