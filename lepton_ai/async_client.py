"""The AsyncClient: the Client's verbs on an event loop, without a thread for anybody who waits."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Protocol

from lepton_ai.accounts import Accounts
from lepton_ai.async_events import AsyncEvents
from lepton_ai.async_flight import Rows
from lepton_ai.async_handle import AsyncJobHandle, AsyncJobReader
from lepton_ai.carried import State
from lepton_ai.client import asked, checked_key, connect, ring_bytes
from lepton_ai.dead import DeadLetter, Settled, those
from lepton_ai.device import Announcement
from lepton_ai.errors import InvalidArguments
from lepton_ai.event import Cursor
from lepton_ai.identity import new_id
from lepton_ai.kernel import KernelSpec
from lepton_ai.quarantine import Quarantined
from lepton_ai.terms import Terms, check_tenant

__all__ = ["AsyncClient"]


class _Connection(AsyncJobReader, Protocol):
    async def submit(
        self,
        kernel: str,
        rows: Iterable[Mapping[str, Any]],
        terms: Terms,
        keys: Sequence[str] | None = None,
        *,
        patient: bool = False,
    ) -> list[AsyncJobHandle]: ...
    def map(self, kernel: str, rows: Rows, terms: Terms, window: int) -> AsyncGenerator[AsyncJobHandle, None]: ...
    def events(self, since: Cursor | None, job: str | None, timeout_s: float | None) -> AsyncEvents: ...
    async def announcements(self) -> list[Announcement]: ...
    async def dead(self, limit: int, job: str | None) -> list[DeadLetter]: ...
    async def replay(self, ids: Iterable[str] | None) -> Settled: ...
    async def purge(self, ids: Iterable[str] | None) -> Settled: ...
    async def quarantined(self) -> list[Quarantined]: ...
    async def lift(self, kernel: str, device: str) -> bool: ...
    async def state(self, kernel: str, state_key: str) -> State | None: ...
    async def forget(self, kernel: str, state_key: str) -> bool: ...
    async def accounts(self) -> Accounts: ...
    async def close(self) -> None: ...


class AsyncClient:
    """A connection to Lepton for one event loop, straight to the broker or through an ingest: see `Client`.

        async with AsyncClient("redis://...") as lepton:
            job = await lepton.submit("linalg.matmul", {"a": a, "b": b})
            result = await job

    Thousands of tasks may wait at once: straight to the broker, one connection brings the results of all of them; over
    HTTP, where more than 16 wait, each job is looked at about once in 2 s.
    Whoever waits may be cancelled at any moment; a submission that is cancelled may have gone out or not.
    Use it in an `async with`, or `await close()` it: what still waits then gets BrokerUnavailable.
    """

    def __init__(self, url: str | None = None, *, tenant: str | None = None) -> None:
        check_tenant(tenant)
        self._connection = connect(url, partial(_direct, tenant=tenant), partial(_remote, tenant=tenant))

    async def submit(
        self,
        kernel: str,
        arguments: Mapping[str, Any],
        *,
        priority: int | None = None,
        device: str | None = None,
        key: str | None = None,
        delay_s: float | None = None,
        deadline_s: float | None = None,
        limit_s: float | None = None,
        must_meet: bool = False,
        state_key: str | None = None,
    ) -> AsyncJobHandle:
        """Submits one job; when this returns, the broker has it: see `Client.submit`."""
        terms = asked(priority, device, delay_s, deadline_s, limit_s, must_meet=must_meet, state_key=state_key)
        return (await self._connection.submit(kernel, [arguments], terms, None if key is None else [key]))[0]

    async def submit_many(
        self,
        kernel: str,
        rows: Iterable[Mapping[str, Any]],
        *,
        priority: int | None = None,
        device: str | None = None,
        keys: Sequence[str] | None = None,
        delay_s: float | None = None,
        deadline_s: float | None = None,
        limit_s: float | None = None,
        must_meet: bool = False,
        state_key: str | None = None,
    ) -> list[AsyncJobHandle]:
        """Submits one job for each row of arguments, many of them to a round trip."""
        terms = asked(priority, device, delay_s, deadline_s, limit_s, must_meet=must_meet, state_key=state_key)
        return await self._connection.submit(kernel, rows, terms, keys, patient=True)

    def map(
        self,
        kernel: str,
        rows: Rows,
        *,
        window: int = 1000,
        priority: int | None = None,
        device: str | None = None,
        delay_s: float | None = None,
        deadline_s: float | None = None,
        limit_s: float | None = None,
        must_meet: bool = False,
        state_key: str | None = None,
    ) -> AsyncGenerator[AsyncJobHandle, None]:
        """Submits a job for each row as there is room, and hands out each once it has ended: see `Client.map`.

        `rows` may be an asynchronous iterable too: then rows that are slow to come hold up nothing. Those of an
        ordinary one are taken on the event loop, so they should be there or quickly made. Rows are taken, sent and
        landed while the caller does something else, up to the window. Leaving early ends that: at once by
        `contextlib.aclosing(lepton.map(...))` or `aclose()`, soon after where the iterator is only dropped.
        """
        terms = asked(priority, device, delay_s, deadline_s, limit_s, must_meet=must_meet, state_key=state_key)
        return self._connection.map(kernel, rows, terms, window)

    def job(self, job_id: str) -> AsyncJobHandle:
        """The handle of a job by its id, whoever submitted it."""
        return AsyncJobHandle(job_id, None, self._connection)

    async def cancel(self, job_id: str) -> bool:
        """Asks for a job to be cancelled; False where it has ended: see `Client.cancel`."""
        return await self._connection.cancel(job_id)

    def events(
        self,
        since: str | None = None,
        *,
        job: str | None = None,
        timeout: float | None = None,
    ) -> AsyncEvents:
        """What happens to every job, device and router, as it happens: see `Client.events` and `AsyncEvents`."""
        return self._connection.events(None if since is None else Cursor.parse(since), job, timeout)

    async def devices(self) -> list[Announcement]:
        """Every worker that is alive: its device, slots, measured peaks and kernels."""
        return await self._connection.announcements()

    async def kernels(self) -> dict[str, KernelSpec]:
        """Every kernel that a live worker announces, by name."""
        specs = {spec.name: spec for each in await self._connection.announcements() for spec in each.kernels}
        return dict(sorted(specs.items()))

    async def dead(self, *, limit: int = 100, job: str | None = None) -> list[DeadLetter]:
        """See `Client.dead`."""
        if limit < 1:
            raise InvalidArguments(f"limit is 1 or more, not {limit}", "limit")
        return await self._connection.dead(limit, job)

    async def replay(self, ids: Iterable[str] = (), *, all: bool = False) -> Settled:  # noqa: A002 - as the command line
        """See `Client.replay`."""
        return await self._connection.replay(those(ids, all))

    async def purge(self, ids: Iterable[str] = (), *, all: bool = False) -> Settled:  # noqa: A002
        """See `Client.purge`."""
        return await self._connection.purge(those(ids, all))

    async def quarantined(self) -> list[Quarantined]:
        """The kernels that devices may not run, by kernel and device: see `Client.quarantined`."""
        return await self._connection.quarantined()

    async def lift(self, kernel: str, device: str) -> bool:
        """Lets a device run a kernel again; False where that was not quarantined: see `Client.lift`."""
        return await self._connection.lift(kernel, device)

    async def state(self, kernel: str, state_key: str) -> State | None:
        """What the last job of a state key has left, None where there is nothing: see `Client.state`."""
        return await self._connection.state(kernel, checked_key(state_key))

    async def forget(self, kernel: str, state_key: str) -> bool:
        """Drops that, so that the next job begins anew; False where there is nothing: see `Client.forget`."""
        return await self._connection.forget(kernel, checked_key(state_key))

    async def accounts(self) -> Accounts:
        """Where every accepted job is, or how it ended: see `Client.accounts`."""
        return await self._connection.accounts()

    async def close(self) -> None:
        await self._connection.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _direct(url: str, tenant: str | None) -> _Connection:
    from lepton_ai.async_direct import AsyncDirect  # redis-py is loaded only by those who talk to the broker

    return AsyncDirect(url, new_id(), tenant, ring_bytes())


def _remote(url: str, tenant: str | None) -> _Connection:
    from lepton_ai.async_remote import AsyncRemote  # and httpx by those who talk HTTP

    return AsyncRemote(url, tenant)
