"""The Client: submit jobs, wait for them, ask why they went where they went."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Protocol
from urllib.parse import urlsplit

from lepton_ai.device import Announcement
from lepton_ai.errors import InvalidSettings, NoBroker
from lepton_ai.handle import JobHandle, JobReader
from lepton_ai.identity import new_id
from lepton_ai.job import Options
from lepton_ai.kernel import KernelSpec

__all__ = ["Client"]

_DIRECT = ("redis", "rediss", "unix")
_REMOTE = ("http", "https")


class _Connection(JobReader, Protocol):
    def submit(self, kernel: str, rows: Iterable[Mapping[str, Any]], options: Options) -> list[JobHandle]: ...
    def announcements(self) -> list[Announcement]: ...
    def close(self) -> None: ...


class Client:
    """A connection to Lepton, straight to the broker or through an ingest.

    `redis://`, `rediss://` and `unix://` are a broker, `http(s)://` is an ingest; without a URL it takes
    `LEPTON_REDIS_URL`. Safe for several threads; close it, or use it in a `with`.
    Raises BrokerUnavailable from any call while the other side cannot be reached.
    """

    def __init__(self, url: str | None = None) -> None:
        url = url or os.environ.get("LEPTON_REDIS_URL")
        if not url:
            raise NoBroker("no address: pass Client('redis://host:6379/0') or set LEPTON_REDIS_URL")
        self._connection = _connect(url)

    def submit(
        self,
        kernel: str,
        arguments: Mapping[str, Any],
        *,
        priority: int | None = None,
        device: str | None = None,
    ) -> JobHandle:
        """Submits one job; when this returns, the broker has it.

        `arguments` are arrays, numbers or nested lists by name. `priority` is 1 (low) to 9 (high), unset is the
        middle. `device` pins the job to a device (`gpu.h100`) or a kind of device (`cpu`).
        """
        return self.submit_many(kernel, [arguments], priority=priority, device=device)[0]

    def submit_many(
        self,
        kernel: str,
        rows: Iterable[Mapping[str, Any]],
        *,
        priority: int | None = None,
        device: str | None = None,
    ) -> list[JobHandle]:
        """Submits one job for each row of arguments, in as few round trips as their size allows.

        When this returns, the broker has them all. Where a row cannot be sent or is refused, the error is raised, and
        rows before it may have been accepted.
        """
        return self._connection.submit(kernel, rows, Options(priority=priority, device=device).checked())

    def job(self, job_id: str) -> JobHandle:
        """The handle of a job by its id, whoever submitted it."""
        return JobHandle(job_id, None, self._connection)

    def devices(self) -> list[Announcement]:
        """Every worker that is alive: its device, slots, measured peaks and kernels."""
        return self._connection.announcements()

    def kernels(self) -> dict[str, KernelSpec]:
        """Every kernel that a live worker announces, by name."""
        specs = {spec.name: spec for each in self._connection.announcements() for spec in each.kernels}
        return dict(sorted(specs.items()))

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _connect(url: str) -> _Connection:
    try:
        parts = urlsplit(url)
        scheme, _ = parts.scheme, parts.port
        if scheme in _DIRECT:
            from lepton_ai.direct import Direct  # redis-py is loaded only by those who talk to the broker

            return Direct(url, new_id())
        if scheme in _REMOTE:
            from lepton_ai.remote import Remote  # and httpx by those who talk HTTP

            return Remote(url)
    except ValueError as error:  # what stands before the @ is a secret
        raise InvalidSettings(f"{url.rpartition('@')[2]!r} is not an address: {error}", "url") from None
    raise InvalidSettings(f"an address is one of {', '.join((*_DIRECT, *_REMOTE))}, not {url!r}", "url")
