"""`lepton up`: a whole Lepton on this machine until it is stopped; what dies is started again, Ctrl-C drains.

One thread starts, watches and ends every process (they end when it does); the others only move lines.
"""

from __future__ import annotations

import contextlib
import math
import shlex
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import httpx
import structlog
from rich.console import Console

from lepton_ai import topology
from lepton_ai.errors import BrokerUnavailable, InvalidSettings, LeptonError, NoBroker, Unavailable
from pipeline.output import Output
from pipeline.processes import Processes, Program, ending, environment
from pipeline.setup import FLOWER, Setup, set_up
from pipeline.signals import Signals
from pipeline.supervisor import SERVICES, Arrival
from queues import logs
from queues.addresses import celery_addresses
from queues.broker import LISTS_EACH
from queues.connection import CommandError, Connection
from queues.guardian import Status

__all__ = ["main", "without_password"]

_BROKER, _SERVER = "broker", "broker-server"
#: How long a service may take to end before it is killed. A worker may take as long as its jobs do.
_END_S = 15.0
#: How often a drain that takes its time says what it waits for.
_TELL_S = 2.0
#: How long a terminal that stands still is waited for at the very end.
_LAST_WORDS_S = 2.0
#: How long a drain waits for what the broker has to say: it only wants to tell it.
_ANSWER_S = 3.0
#: How often Flower is told to look for workers (it tells them to send events every 5 s anyway).
_REFRESH_S = 5.0
#: How often the guardian of the broker may be killed before the broker has answered for the first time.
_BROKER_STARTS = 3
#: `python -m pipeline` ends with it where it cannot be started as asked: to start it again would not help.
_AS_ASKED = 2

_Answer = TypeVar("_Answer")

log = structlog.get_logger()


def main(arguments: Sequence[str]) -> int:
    """Runs until stopped. 0 after a drain, 2 where it cannot be started as asked, 130 after a second Ctrl-C."""
    with ExitStack() as stack:
        try:
            setup = set_up(arguments, stack)
        except LeptonError as error:
            sys.stderr.write(f"lepton up: {error}\n")
            return _AS_ASKED
        signals = stack.enter_context(Signals())
        names = ["up", _BROKER, *(each.name for each in setup.programs())]
        output = Output(sys.stdout.fileno(), names, as_json=setup.settings.log == "json")
        stack.callback(output.close, _LAST_WORDS_S)
        logs.configure(setup.settings, "up", output.ours("up"))
        return _Up(setup, output, signals).run()


class _Quit(Exception):
    """The second Ctrl-C."""


class _Up:
    def __init__(self, setup: Setup, output: Output, signals: Signals) -> None:
        self._setup = setup
        self._output = output
        self._signals = signals
        self._processes = Processes(output.of, _note, restart=True)
        self._arrival = Arrival(setup.broker_url, setup.http_url, setup.workers)
        self._workers = [each.process for each in setup.workers]
        self._broker_failed = ""

    def run(self) -> int:
        """Everything from the first process to the last."""
        try:
            try:
                self._start()
                while True:
                    self._signals.check()
                    self._turn()
            except KeyboardInterrupt:
                self._drain()
            return 0
        except _Quit:
            log.warning("quitting", killed=sorted(self._processes.running))
            return 128 + self._signals.received[-1]
        except (InvalidSettings, Unavailable) as error:
            log.error("up_failed", reason=error.message)
            return _AS_ASKED if isinstance(error, InvalidSettings) else 1
        finally:
            self._processes.leave_all()
            self._processes.kill([name for name in self._processes.running if name != _BROKER])
            self._processes.stop([_BROKER], _END_S)

    def _turn(self, longest_s: float = math.inf) -> dict[str, int]:
        """Waits for the next thing to happen and sees to it; returns who has ended by itself. Raises _Quit."""
        self._signals.wait(min(longest_s, self._processes.due_s, 60.0))
        if len(self._signals.received) > 1:
            raise _Quit
        return self._processes.look()

    # -- start ------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Returns once everything is up; KeyboardInterrupt where it is told to stop before."""
        began = time.monotonic()
        if (arguments := self._setup.guardian()) is not None:
            self._processes.start(Program(_BROKER, arguments, environment({}), self._hear_guardian))
            self._await_broker()
        as_json = self._setup.settings.log == "json"
        if as_json:
            self._tell_starting()
        programs = self._setup.programs()
        for program in programs:
            if program.name != FLOWER:
                self._processes.start(program)
        while not self._arrival.complete():
            self._signals.check()
            gone = self._turn(0.1)
            if asked := [name for name in SERVICES if gone.get(name) == _AS_ASKED]:
                raise InvalidSettings(f"{', '.join(asked)} cannot be started as asked; the lines above say why")
            self._tell_arrived(began)
        self._tell_arrived(began)
        for program in programs:
            if program.name == FLOWER:  # it asks the workers what they are once, at its start
                self._processes.start(program)
                threading.Thread(target=_refresh, args=(self._setup.flower_url,), name="refresh", daemon=True).start()
        log.info("up_ready", seconds=round(time.monotonic() - began, 2))
        if not as_json:
            self._introduce()

    def _await_broker(self) -> None:
        """Returns once it answers; NoBroker where its guardian gives up, or is killed time and again."""
        killed = 0
        while not self._broker_answers():
            self._signals.check()
            code = self._turn(0.05).get(_BROKER)
            if code is None:
                continue
            killed += 1
            if code >= 0 or killed >= _BROKER_STARTS:
                raise NoBroker(f"the broker did not start: {self._broker_failed or ending(code)}")

    def _tell_arrived(self, began: float) -> None:
        for name in self._arrival.news():
            log.info("device_ready", device=name, seconds=round(time.monotonic() - began, 2))

    def _broker_answers(self) -> bool:
        try:
            with contextlib.closing(Connection(self._setup.broker_url, "up")) as connection:
                connection.call("PING")
        except (BrokerUnavailable, CommandError):
            return False
        return True

    def _hear_guardian(self, line: bytes) -> None:
        """What the guardian tells of its server. On a thread of its own."""
        status = Status.read(line)
        if status.event == "started":
            _note("process_started", name=_SERVER, pid=status.pid)
        elif status.event == "ended":
            _note("process_lost", name=_SERVER, how=ending(status.code), reason=status.reason)
        elif status.event == "waiting":
            log.warning("broker_waiting", reason=status.reason)
        else:
            self._broker_failed = status.reason
            log.error("broker_failed", reason=status.reason)

    def _tell_starting(self) -> None:
        setup = self._setup
        log.info(
            "up_starting",
            broker=without_password(setup.broker_url),
            http=setup.http_url,
            openapi=setup.openapi_url,
            flower=setup.flower_url,
            data=None if setup.data is None else str(setup.data),
            workers={each.name: each.slots for each in setup.workers},
        )

    def _introduce(self) -> None:
        """Tells people where everything is, to be pasted into a shell; with a password only where it is our own."""
        setup = self._setup
        own = setup.broker_url if setup.data is not None else without_password(setup.broker_url)
        emulated = {each.kind for each in setup.found if each.emulated}
        lines = {
            "HTTP": shlex.quote(setup.http_url),
            "OpenAPI": shlex.quote(setup.openapi_url),
            "Flower": setup.flower_url,
            "Python client": f"LEPTON_REDIS_URL={shlex.quote(own)}",
            "Celery": f"{shlex.quote(celery_addresses(own)[0])} (broker and result backend of a producer)",
            "data": setup.data,
            "workers": ", ".join(
                f"{each.name} ({each.slots} slot{'s' if each.slots > 1 else ''}"
                f"{', emulated' if each.device.partition('.')[0] in emulated else ''})"
                for each in setup.workers
            ),
        }
        stream = self._output.ours()
        console = Console(file=stream, force_terminal=stream.isatty(), soft_wrap=True, highlight=False)
        for name, value in lines.items():
            if value:
                console.print(f"  [bold]{name:<15}[/bold]", end="")
                console.print(str(value), markup=False)
        console.print("Ctrl-C drains, twice quits.")

    # -- end --------------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Ends everything in the order in which nothing is lost or left half done. Raises _Quit."""
        others = [name for name in self._processes.running if name != _BROKER]
        log.info("draining", processes=others, hint="once more quits at once")
        self._processes.leave({*others, *SERVICES, *self._workers, FLOWER})
        self._end(["ingest", "router"])
        self._end_workers()
        waiting = self._ask(self._waiting)
        self._end(["telemetry", FLOWER])
        self._end([_BROKER])
        kept = {} if self._setup.data is None else {"kept_in": str(self._setup.data)}
        log.info("up_stopped", jobs_waiting=waiting, **kept)

    def _end(self, names: Collection[str]) -> None:
        self._processes.end(names)
        deadline = time.monotonic() + _END_S
        while left := [name for name in names if name in self._processes.running]:
            self._turn(max(0.0, deadline - time.monotonic()))
            if time.monotonic() >= deadline:
                log.warning("killing", processes=left, after_s=_END_S)
                self._processes.kill(left)

    def _end_workers(self) -> None:
        """Lets workers finish and commit what they have taken; who still warms up has taken nothing."""
        serving = self._ask(self._jobs_in_hand)
        if serving is not None:
            self._processes.kill([name for name in self._workers if name not in serving])
        self._processes.end(self._workers)
        tell_at = time.monotonic() + _TELL_S
        while left := [name for name in self._workers if name in self._processes.running]:
            self._turn(max(0.0, tell_at - time.monotonic()))
            if time.monotonic() >= tell_at:
                jobs = self._ask(self._jobs_in_hand) or {}
                log.info("draining", jobs_in_hand={name: jobs.get(name, 0) for name in left})
                tell_at = time.monotonic() + _TELL_S

    def _ask(self, question: Callable[[Connection], _Answer]) -> _Answer | None:
        """What the broker answers, or None; on a thread, because one that hangs must not hold up a second Ctrl-C."""
        answers: list[_Answer] = []

        def ask() -> None:
            with (
                contextlib.suppress(LeptonError),
                contextlib.closing(Connection(self._setup.broker_url, "up")) as broker,
            ):
                answers.append(question(broker))

        asking = threading.Thread(target=ask, name="ask", daemon=True)
        asking.start()
        asking.join(0.1)
        deadline = time.monotonic() + _ANSWER_S
        while asking.is_alive() and time.monotonic() < deadline:
            self._turn(0.05)
        return answers[0] if answers else None

    def _jobs_in_hand(self, broker: Connection) -> dict[str, int]:
        """The workers that serve now, with how many jobs each has taken."""
        now, clock = time.time(), time.monotonic()
        found: dict[str, int] = {}
        for worker, each in self._arrival.announced().items():
            name = f"worker-{worker}"
            if each.started_at >= now - clock + self._processes.began(name):  # not the lease of one that was killed
                held = [("LLEN", topology.held(each.incarnation, slot)) for slot in range(each.slots)]
                found[name] = sum(broker.many(held))
        return found

    def _waiting(self, broker: Connection) -> int:
        """Jobs that nobody has finished: in a lane, a device queue, parked, or held by one who was killed."""
        names = [topology.HOLDERS, topology.DEVICES, topology.PARKED]
        found = broker.many([("SMEMBERS", name) for name in names])
        holders, devices, parked = ([each.decode(errors="replace") for each in members] for members in found)
        lists = [topology.AGAIN, *topology.lane_lists()]
        lists += map(topology.device_queue, devices)
        lists += map(topology.parked, parked)
        for holder in holders:
            for number in range(LISTS_EACH):
                lists += (topology.held(holder, number), topology.claim(holder, number))
        lengths: list[int] = broker.many([("LLEN", each) for each in lists])
        lanes, others = broker.many([("HGET", topology.BUNDLED, topology.LANE), ("HGET", topology.COUNTERS, "bundled")])
        return sum(lengths) + max(0, int(lanes or 0)) + max(0, int(others or 0))


def _refresh(flower_url: str) -> None:
    """Has Flower look again and again for workers that have come since, which it does only where it is told to."""
    while True:
        with contextlib.suppress(httpx.HTTPError):
            httpx.get(f"{flower_url}/workers", params={"refresh": 1, "json": 1}, timeout=_REFRESH_S)
        time.sleep(_REFRESH_S)


def _note(event: str, **fields: Any) -> None:
    (log.warning if event in ("process_lost", "process_not_started") else log.info)(event, **fields)


def without_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"
