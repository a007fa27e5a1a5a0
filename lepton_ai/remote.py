"""The client's way over HTTP: the same jobs through an ingest, where the broker itself is out of reach."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import httpx
import msgspec

from lepton_ai import wire
from lepton_ai.device import Announcement
from lepton_ai.errors import BrokerUnavailable, UnknownJob, from_wire
from lepton_ai.handle import JobHandle
from lepton_ai.job import FINAL_STATES, Meta, Options, Placement, Record

__all__ = ["JobRequest", "JobView", "Remote"]

#: The longest that one request waits; a longer wait is several requests.
_WAIT_S = 20.0
_REQUEST_BYTES = 4 * 1024 * 1024


class JobRequest(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """One job as `POST /v1/jobs` takes it."""

    kernel: str
    arguments: dict[str, wire.Value]
    priority: int | None = None
    device: str | None = None


class JobView(msgspec.Struct, omit_defaults=True):
    """One job as `/v1/jobs` answers it. `result` and `error` are there once it has ended."""

    id: str
    kernel: str
    state: str
    result: dict[str, wire.Value] | None = None
    error: dict[str, Any] | None = None
    record: Record | None = None


_VIEW = msgspec.msgpack.Decoder(JobView)
_VIEWS = msgspec.msgpack.Decoder(list[JobView])
_ANNOUNCEMENTS = msgspec.msgpack.Decoder(list[Announcement])
_STATUS = {ours: celerys for celerys, ours in FINAL_STATES.items()}


class Remote:
    """A connection to an ingest. Safe for several threads."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=_WAIT_S + 10, headers={"accept": wire.MSGPACK})

    def submit(self, kernel: str, rows: Iterable[Mapping[str, Any]], options: Options) -> list[JobHandle]:
        """Posts one job a row in requests of a few MiB; each is accepted whole or not at all.

        When this returns, the broker has them all; where a row is refused, it may have those before it.
        """
        requests = (
            wire.pack(
                {
                    "kernel": kernel,
                    "arguments": {name: wire.to_value(value) for name, value in row.items()},
                    "priority": options.priority,
                    "device": options.device,
                }
            )
            for row in rows
        )
        handles: list[JobHandle] = []
        for batch in wire.batches(requests, _REQUEST_BYTES):
            body = wire.pack([msgspec.Raw(request) for request in batch])
            found = self._call("POST", "/v1/jobs", content=body, headers={"content-type": wire.MSGPACK})
            handles += [JobHandle(view.id, view.kernel, self) for view in _VIEWS.decode(found)]
        return handles

    def wait(self, job: JobHandle, timeout_s: float | None) -> Meta | None:
        """See JobReader."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = _WAIT_S if deadline is None else min(_WAIT_S, max(0.0, deadline - time.monotonic()))
            view = self._view(job.id, left)
            if view.state in _STATUS:
                return _meta(view)
            if deadline is not None and time.monotonic() >= deadline:
                return None

    def look(self, job_id: str) -> tuple[Meta | None, Placement | None]:
        """See JobReader."""
        try:
            view = self._view(job_id, 0)
        except UnknownJob:
            return None, None
        return _meta(view), view.record.placement if view.record else None

    def announcements(self) -> list[Announcement]:
        """Every worker that is alive, in the order of their devices' names."""
        return _ANNOUNCEMENTS.decode(self._call("GET", "/v1/devices"))

    def close(self) -> None:
        self._http.close()

    def _view(self, job_id: str, wait_s: float) -> JobView:
        return _VIEW.decode(self._call("GET", f"/v1/jobs/{job_id}", params={"wait_s": f"{wait_s:.3f}"}))

    def _call(self, method: str, path: str, **more: Any) -> bytes:
        try:
            response = self._http.request(method, path, **more)
        except httpx.HTTPError as error:
            raise BrokerUnavailable(f"{self._http.base_url} cannot be reached: {error}") from error
        if response.is_success:
            return response.content
        try:
            problem = msgspec.json.decode(response.content, type=dict[str, Any])
        except msgspec.DecodeError:
            problem = {}
        code = problem.get("code", "internal")
        message = problem.get("detail") or f"HTTP {response.status_code}"
        raise from_wire({"code": code, "message": message, "field": problem.get("field")})


def _meta(view: JobView) -> Meta | None:
    if view.state not in _STATUS:
        return None
    record = view.record or Record()
    if view.error is not None:
        record = msgspec.structs.replace(record, error=view.error)
    result = {name: wire.decode_value(value) for name, value in (view.result or {}).items()}
    return Meta(_STATUS[view.state], result, task_id=view.id, lepton=record)
