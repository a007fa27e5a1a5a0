"""The services and workers of a play, each behind a proxy of its own, so that one can be cut off and no other."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import msgspec

from lepton_ai import services, topology
from pipeline.supervisor import free_port, worker_arguments
from queues.broker import announcements
from tests.faults.actors import Actor
from tests.faults.proxy import Proxy

if TYPE_CHECKING:
    from tests.faults.play import Play

__all__ = ["Fleet", "Member", "clean_environment"]

_HERE = Path(__file__).parent
_UP_S = 60.0


class Member(msgspec.Struct, frozen=True, eq=False):
    """One process of the fleet and its way to the broker."""

    actor: Actor
    proxy: Proxy
    device: str = ""
    """Of a worker."""
    slots: int = 0


class Fleet:
    """What `lepton up` would start, in the hands of a play."""

    def __init__(self, play: Play, settings: Mapping[str, object]) -> None:
        self.play = play
        self.routers: list[Member] = []
        self.workers: dict[str, Member] = {}
        """By device."""
        self.ingest: Member | None = None
        self.http_port = 0
        self.http_url = ""
        self.lease_s = float(str(settings.get("lease_s", 5.0)))
        self._dead: set[str] = set()
        self._settings = {f"LEPTON_{name.upper()}": str(value) for name, value in settings.items()}

    def add_router(self, name: str) -> Member:
        """One more router, not started yet."""
        member = self._member(name, ["-m", "pipeline", "router"])
        self.routers.append(member)
        return member

    def add_worker(self, device: str, slots: int = 2, **environ: str) -> Member:
        """A real Celery worker for a device, not started yet."""
        member = self._member(f"worker-{device}", worker_arguments(device, slots), device, slots, **environ)
        self.workers[device] = member
        return member

    def add_ingest(self) -> Member:
        """The ingest, not started yet."""
        self.http_port = free_port()
        self.http_url = f"http://127.0.0.1:{self.http_port}"
        self.ingest = self._member("ingest", ["-m", "pipeline", "ingest"], LEPTON_HTTP_PORT=str(self.http_port))
        return self.ingest

    @property
    def members(self) -> list[Member]:
        return [*self.routers, *self.workers.values(), *([self.ingest] if self.ingest else [])]

    def up(self) -> None:
        """Starts whoever has not been yet and returns once all are ready to work."""
        for member in self.members:
            if not member.actor.started_at:
                member.actor.start()
        for member in self.members:
            self.await_online(member)

    def await_online(self, member: Member, limit_s: float = _UP_S) -> None:
        """Returns once a process that has been started is ready to work; says why where it is not."""
        try:
            self.play.until(f"{member.actor.name} is online", lambda: self.is_online(member), limit_s)
        except Exception as error:
            error.add_note(member.actor.said[-2000:])
            raise

    def is_online(self, member: Member) -> bool:
        """Whether a process has announced itself since its last start."""
        if member is self.ingest:
            with contextlib.suppress(httpx.HTTPError):
                return httpx.get(f"{self.http_url}/readyz", timeout=2).is_success
            return False
        return bool(self.incarnation(member))

    def incarnation(self, member: Member) -> str:
        """The name under which a process that has started holds its lease; empty where it has none yet."""
        with contextlib.closing(self.play.connect()) as connection:
            if member.device:
                # Not by when they say they started: a worker's clock may be wrong.
                connected = connection.call("CLIENT", "LIST").decode()
                mine = [each.incarnation for each in announcements(connection) if each.device == member.device]
                living = [each for each in mine if each not in self._dead and f"name={each}-lease " in connected]
                return living[-1] if living else ""
            said = re.findall(r"router-[0-9a-f]{16}", member.actor.said_now)
            return said[-1] if said and connection.call("EXISTS", topology.lease(said[-1])) else ""

    def kill(self, member: Member) -> str:
        """SIGKILL; returns the incarnation that died, whose lists are watched from now on."""
        incarnation = self.incarnation(member)
        member.actor.kill()
        self.bury(incarnation)
        return incarnation

    def bury(self, incarnation: str) -> None:
        """Notes that a process has just died, or is as good as dead to the others: its lists are watched."""
        if incarnation:
            self._dead.add(incarnation)
            self.play.recovery.died(incarnation)

    def restart(self, member: Member) -> None:
        """Starts a process again and returns once it is ready to work."""
        member.actor.start()
        self.await_online(member)

    def _member(self, name: str, arguments: list[str], device: str = "", slots: int = 0, **environ: str) -> Member:
        proxy = self.play.network.proxy(self.play.server.port)
        own = {
            "LEPTON_KERNELS": "fault_kernels",
            "LEPTON_EVENTS_KEPT": "1000000",  # the auditor reads all of them
            **self._settings,
            "LEPTON_REDIS_URL": proxy.url,
            "FAULT_RUNS": str(self.play.folder / "runs"),
            **environ,
        }
        command = [sys.executable, "-P", *arguments]
        return Member(self.play.stage.cast(name, command, clean_environment(own)), proxy, device, slots)


def clean_environment(own: Mapping[str, str]) -> dict[str, str]:
    """Ours without any setting of Lepton's, with `own` on top; the kernels of the plays can be imported."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("LEPTON_")}
    path = os.pathsep.join([str(_HERE), *filter(None, [ours.get("PYTHONPATH")])])
    return services.environ({**ours, "PYTHONPATH": path, **own})
