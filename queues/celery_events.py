"""Celery's own task events, as Flower and `celery events` read them: lists of them, in one message of kombu's.

Flower follows about a thousand jobs a second and no more, so the router decides which jobs are shown, and only while
somebody listens (`Audience`). Types are Celery's alone: one that it does not know and that begins with `task-` would
freeze a row (celery/events/state.py).
"""

from __future__ import annotations

import base64
import os
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import msgspec

__all__ = ["Audience", "EventMessage", "node_name", "task_event", "worker_event"]

#: How long nobody is told anything after nobody listened.
_QUIET_S: Final = 1.0

_JSON = msgspec.json.Encoder()


def task_event(kind: str, job: str, at: float, **fields: Any) -> dict[str, Any]:
    """One of Celery's task events (`sent`, `received`, `started`, `succeeded`, `failed`, `revoked`) at a time."""
    return {"type": f"task-{kind}", "uuid": job, "timestamp": at, **fields}


def worker_event(kind: str, at: float, **fields: Any) -> dict[str, Any]:
    """One of Celery's worker events (`online`, `heartbeat`, `offline`)."""
    return {"type": f"worker-{kind}", "timestamp": at, **fields}


class EventMessage:
    """Makes the messages of one node, `hostname` in Celery's words (`cpu@host`)."""

    def __init__(self, url: str, hostname: str) -> None:
        self._hostname = hostname
        self._clock = 0
        database = _database(url)
        # Celery's gossip listens to the worker events by this very name, and to no list of them.
        self._topics = {
            "task": f"/{database}.celeryev/task.multi",
            **{f"worker-{kind}": f"/{database}.celeryev/worker.{kind}" for kind in ("online", "heartbeat", "offline")},
        }

    def tasks(self, events: Sequence[Mapping[str, Any]]) -> tuple[str, str, bytes]:
        """The command that tells of these task events; its reply is how many listen. An empty list only asks that."""
        return ("PUBLISH", self._topics["task"], self._message([self._signed(each) for each in events]))

    def worker(self, event: Mapping[str, Any]) -> tuple[str, str, bytes]:
        """The command that tells of one worker event."""
        return ("PUBLISH", self._topics[event["type"]], self._message(self._signed(event)))

    def _signed(self, event: Mapping[str, Any]) -> dict[str, Any]:
        self._clock += 1
        return {
            **event,
            "hostname": self._hostname,
            "pid": os.getpid(),
            "clock": self._clock,
            "utcoffset": _utc_offset_h(),
        }

    def _message(self, body: Any) -> bytes:
        return _JSON.encode(
            {
                "body": base64.b64encode(_JSON.encode(body)).decode(),
                "content-encoding": "utf-8",
                "content-type": "application/json",
                "headers": {"hostname": self._hostname},
                "properties": {
                    "delivery_mode": 1,
                    "delivery_info": {"exchange": "celeryev", "routing_key": "task.multi"},
                    "priority": 0,
                    "body_encoding": "base64",
                    "delivery_tag": str(uuid.uuid4()),
                },
            }
        )


class Audience:
    """Whether anybody listens, and how many jobs a second they are shown. One thread; the time comes in."""

    def __init__(self, rate_hz: float) -> None:
        self._rate_hz = rate_hz
        self._allowance = rate_hz
        self._at = 0.0
        self._quiet_until = 0.0
        self.listening = False

    def heard_by(self, count: int, now: float) -> None:
        """The broker's answer to a message: how many it reached."""
        self.listening = count > 0
        if not count:
            self._quiet_until = now + _QUIET_S

    def should_ask(self, now: float) -> bool:
        """Nobody listened when we last told something, and that is a while ago."""
        return not self.listening and now >= self._quiet_until and self._rate_hz > 0

    def has_room(self, now: float, wanted: int = 1) -> bool:
        """Whether so many jobs would be shown, or as many as there ever is room for."""
        if not self.listening or self._rate_hz <= 0:
            return False
        self._allowance = min(self._rate_hz, self._allowance + (now - self._at) * self._rate_hz)
        self._at = now
        return self._allowance >= min(wanted, self._rate_hz)

    def room(self, now: float, wanted: int) -> int:
        """How many of so many jobs are shown: all up to the rate, with one second's worth at once at most."""
        if not self.has_room(now):
            return 0
        shown = min(wanted, int(self._allowance))
        self._allowance -= shown
        return shown


def node_name(kind: str) -> str:
    """A node's name as Celery forms it: `router@host`."""
    return f"{kind}@{socket.gethostname()}"


def _utc_offset_h() -> float:
    """As celery.utils.time.utcoffset: hours that local time is behind UTC."""
    return (time.altzone if time.localtime().tm_isdst else time.timezone) / 3600


def _database(url: str) -> int:
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return int(parse_qs(parts.query).get("db", ["0"])[0])
    return int(parts.path.strip("/") or 0)
