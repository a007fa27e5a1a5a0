"""One play: a broker, the processes of a Lepton before it, the jobs, and whatever a scenario does to them."""

from __future__ import annotations

import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lepton_ai.errors import BrokerUnavailable, LeptonError
from queues.connection import CommandError, Connection
from tests.faults.actors import Actor, Stage
from tests.faults.auditor import Auditor, counters, waiting
from tests.faults.fleet import Fleet
from tests.faults.load import Load
from tests.faults.proxy import Network
from tests.faults.recovery import Recovery, lists_of
from tests.faults.server import Server

__all__ = ["Play", "Unfinished"]

_LOOK_EVERY_S = 0.02


class Unfinished(Exception):
    """What a play waited for did not happen."""


class Play:
    """What a scenario acts on. Everything random comes from `chance`, which the seed decides. Use it in a `with`."""

    def __init__(self, folder: Path, seed: int, tell: Callable[[str], None]) -> None:
        self.folder = folder
        self.seed = seed
        self.chance = random.Random(seed)
        self.tell = tell
        self.began_at = time.time()
        self.auditor = Auditor(folder / "runs")
        self.complaints: list[str] = []
        """What was not as promised, beside what the auditor finds."""
        self.doomed: set[str] = set()
        """Jobs that are to fail; every other is to succeed."""
        self.endless: set[str] = set()
        """Jobs that never end, but whose messages are still there: of plain Celery."""
        self.told: Counter[str] | None = None
        """How often each job's waiter was told an end, where that is not in Lepton's events: of plain Celery."""
        self.notes: dict[str, Any] = {}
        """Figures of this scenario alone."""
        self.loads: list[Load] = []
        self._stack = ExitStack()

    def __enter__(self) -> Play:
        self.stage = self._stack.enter_context(Stage(self.folder))
        self.network = self._stack.enter_context(Network())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def serve(self, folder: Path | None = None, *, file_bytes: int = 0, **options: str) -> Server:
        """Starts the broker, once a play. `options` are its settings (`appendfsync="always"`)."""
        names = {name.replace("_", "-"): value for name, value in options.items()}
        self.server = Server(self.stage, folder or self.folder / "data", names, file_bytes=file_bytes)
        self.server.start()
        self.recovery = self._stack.enter_context(Recovery(self.server.connect))
        return self.server

    def fleet(
        self,
        devices: Collection[str] = ("cpu",),
        *,
        slots: int = 2,
        routers: int = 1,
        ingest: bool = False,
        **settings: object,
    ) -> Fleet:
        """Starts a Lepton before the broker and returns once it is up. `settings` as LEPTON_ has them, in small."""
        if not hasattr(self, "server"):
            self.serve()
        fleet = Fleet(self, settings)
        for number in range(routers):
            fleet.add_router(f"router-{number}")
        for device in devices:
            fleet.add_worker(device, slots)
        if ingest:
            fleet.add_ingest()
        fleet.up()
        return fleet

    def load(self, url: str | None = None) -> Load:
        """Somebody who submits jobs, by default straight to the broker, with no proxy between."""
        load = self._stack.enter_context(Load(self.auditor, url or self.server.url))
        self.loads.append(load)
        return load

    def expect(self, condition: bool, otherwise: str) -> None:
        """Notes what was not as promised; the play goes on."""
        if not condition:
            self.complaints.append(otherwise)
            self.tell(f"  {otherwise}")

    # -- waiting ------------------------------------------------------------------------------------------------

    def rest(self, seconds: float) -> None:
        """Lets the others play on for so long."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.stage.supervise()
            time.sleep(min(left, _LOOK_EVERY_S))

    def until(self, what: str, true: Callable[[], object], limit_s: float = 30.0) -> None:
        """Returns once it is true; Unfinished after `limit_s`. Who ends by itself meanwhile is started again."""
        deadline = time.monotonic() + limit_s
        while True:
            self.stage.supervise()
            with contextlib.suppress(BrokerUnavailable, CommandError):
                if true():
                    return
            if time.monotonic() > deadline:
                raise Unfinished(f"in vain for {limit_s:g} s: {what}")
            time.sleep(_LOOK_EVERY_S)

    def drain(self, limit_s: float = 120.0, still_s: float = 45.0) -> float:
        """Waits until every acknowledged job has ended; gives up after `limit_s`, or `still_s` without one that does.

        Whoever has not ended by then is for the auditor to find. Returns the longest time in which none ended.
        """
        left: list[str] | None = None
        stillest_s = 0.0
        began = moved = time.monotonic()
        while left is None or left:
            self.stage.supervise()
            with contextlib.suppress(BrokerUnavailable, CommandError), contextlib.closing(self.connect()) as connection:
                now = self.auditor.unfinished(connection, left)
                stillest_s = max(stillest_s, time.monotonic() - moved)
                moved = time.monotonic() if left is None or len(now) < len(left) else moved
                left = now
            if time.monotonic() - began > limit_s or time.monotonic() - moved > still_s:
                self.tell(f"  the drain ends with {'?' if left is None else len(left)} jobs unfinished")
                return stillest_s
            if left:
                time.sleep(0.1)
        self.notes.setdefault("drain_s", round(time.monotonic() - began, 2))
        self._settle()
        return stillest_s

    def _settle(self) -> None:
        """A last copy of a job that ran twice may still be on its way: gives it the time of a sweep to end."""
        with contextlib.suppress(Unfinished), contextlib.closing(self.connect()) as connection:
            self.until("everything is out of the lists", lambda: not waiting(connection), 8.0)

    # -- looking ------------------------------------------------------------------------------------------------

    def connect(self) -> Connection:
        """A connection to the broker that no proxy sees."""
        return self.server.connect()

    def ask(self, *command: str | bytes | int | float) -> Any:
        """One command, straight to the broker."""
        with contextlib.closing(self.connect()) as connection:
            return connection.call(*command)

    def counters(self) -> dict[str, int]:
        """What Lepton itself has counted."""
        with contextlib.closing(self.connect()) as connection:
            return counters(connection)

    def server_bytes(self) -> int:
        """The memory that the broker uses."""
        lines = self.ask("INFO", "memory").decode().splitlines()
        return int(next(line for line in lines if line.startswith("used_memory:")).partition(":")[2])

    def waits(self, name: str) -> bool:
        """Whether the connection of that name waits for a message now."""
        connections = self.ask("CLIENT", "LIST").decode().splitlines()
        return any(f"name={name} " in each and "cmd=blmove" in each for each in connections)

    def held(self, incarnation: str) -> int:
        """How many messages lie in the lists of an incarnation."""
        with contextlib.closing(self.connect()) as connection:
            return sum(connection.many([("LLEN", each) for each in lists_of(incarnation)]))

    def fenced(self) -> int:
        """How many commits were refused because their worker had lost the batch."""
        counted = int(self.ask("HGET", "lepton:counters", "fenced") or 0)
        said = sum(actor.said.count("commit_fenced") for actor in self.stage.actors.values())
        return max(counted, said)

    def nobody_exits(self, but: Iterable[Actor] = ()) -> None:
        """Expects that nobody has ended without being told to."""
        spared = {actor.name for actor in but}
        found = [(name, code) for name, code in self.stage.exits if name not in spared]
        self.expect(not found, f"ended by themselves: {found}")

    def tolerate(self, step: Callable[[], object]) -> bool:
        """Whether a step that may be refused went well."""
        try:
            step()
        except LeptonError:
            return False
        return True
