"""The router: claim, place, dispatch, learn. One thread, one incarnation, woken by pushes and never by polling.

It wakes on a message on a lane, on an event (a commit gives a device room and teaches the cost model), and once a
heartbeat to renew its lease. The thinking is in `pricing` and in the policy; this file only moves.
"""

from __future__ import annotations

import secrets
import select
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from itertools import chain

import msgspec
import structlog

from lepton_ai import event, topology, wire
from lepton_ai.errors import BrokerUnavailable, Fenced, LeptonError
from lepton_ai.event import Event
from lepton_ai.job import Pin, Placement
from lepton_ai.placement.costs import CostModel
from lepton_ai.placement.problem import Policy
from lepton_ai.settings import Settings
from pipeline import intake
from pipeline.bundles import Bundles
from pipeline.cluster import Cluster
from pipeline.credit import Credit
from pipeline.deadlines import Backlog, backlog_of, judged
from pipeline.endings import Endings, noted_in
from pipeline.intake import Dead, Incoming, Refused
from pipeline.node import Narrator, RemoteControl
from pipeline.peers import Peers
from pipeline.placer import Placer
from pipeline.planner import Planner
from pipeline.probes import Probes
from pipeline.regret import Regret
from pipeline.sequels import Sequels
from pipeline.telemetry import ENDED, learn
from pipeline.window import Claim, ClaimedJob, Window
from queues import functions, recovery
from queues.broker import ROUTER, Broker, Kind, announcements, routers
from queues.connection import Connection
from queues.event_stream import EventStream

__all__ = ["Router"]

#: Jobs that are priced and placed in one step; the rest of a deep window waits for the next.
_STEP = 512
_RETRY_S = (0.05, 2.0)
#: So long it claims at a stretch before it places what it has and renews its lease.
_CLAIM_S = 0.05
#: How often a broker whose memory is full is asked, which tells nobody of anything.
_FULL_S = 0.1
#: Jobs that are asked to be cancelled are looked for among the scheduled ones so many at a time.
_ASKED_AT_ONCE = 1024
_MSGPACK = msgspec.msgpack.Encoder()
_PLACEMENT = msgspec.msgpack.Decoder(Placement)

log = structlog.get_logger()


class Router:
    """Runs until `stop` is set, session after session: one ends when the broker or its claims are lost."""

    def __init__(self, settings: Settings, url: str, policy: Policy | None = None) -> None:
        self._settings = settings
        self._url = url
        self._model = CostModel()
        self._planner = Planner(settings, self._model, policy)
        self._left: list[str] = []
        """Earlier incarnations of ours whose sessions ended without giving back what they had claimed."""

    def run(self, stop: threading.Event) -> None:
        """Serves session after session until `stop` is set."""
        pause_s = _RETRY_S[0]
        while not stop.is_set():
            try:
                self._give_back()
                session = _Session(self._settings, self._url, self._planner, self._model)
                self._left.append(session.incarnation)
                pause_s = _RETRY_S[0]
                if session.serve(stop):
                    self._left.remove(session.incarnation)
            except Fenced as error:
                log.warning("router_fenced", reason=error.message)
            except BrokerUnavailable as error:
                log.warning("broker_unavailable", reason=error.message, retry_s=pause_s)
                stop.wait(pause_s)
                pause_s = min(pause_s * 2, _RETRY_S[1])
            except Exception:  # a defect of ours must not stop the fleet: what was claimed is given back, and on we go
                log.exception("router_failed")
                stop.wait(_RETRY_S[1])

    def _give_back(self) -> None:
        """Gives back at once what sessions that were cut off still hold, rather than have it wait for their leases."""
        if not self._left:
            return
        with closing(Connection(self._url, "router-left")) as connection:
            functions.load(connection)
            while self._left:
                connection.call("DEL", topology.lease(self._left[-1]))
                moved = recovery.give_back(connection, self._left[-1])
                log.info("claims_given_back", router=self._left.pop(), messages=moved)


class _Session:
    def __init__(self, settings: Settings, url: str, planner: Planner, model: CostModel) -> None:
        self._settings = settings
        self._url = url
        self._planner = planner
        self._model = model
        self.incarnation = self._incarnation = f"{ROUTER}{secrets.token_hex(8)}"
        self._main = Connection(url, self._incarnation)
        self._wake = Connection(url, f"{self._incarnation}-wake")
        self._events = EventStream(Connection(url, f"{self._incarnation}-events"))
        self._broker = Broker(self._main, self._incarnation, settings)
        self._cluster = Cluster()
        self._window = Window(self._incarnation, settings.window, settings.window_bytes)
        self._sequels = Sequels(settings, lambda: self._cluster.kernels)
        self._narrator = Narrator(url, settings, self._main)
        self._endings = Endings(self._broker, self._window, self._cluster, self._narrator, self._sequels, settings)
        self._bundles = Bundles(self._broker, self._window, self._cluster, self._model, self._narrator)
        self._credit = Credit(self._cluster, settings)
        self._peers = Peers(self.incarnation, self._cluster)
        self._probes = Probes(self._cluster, model)
        self._regret = Regret(self._cluster, model)
        self._placer = Placer(
            self._broker, self._cluster, planner, self._credit, self._probes, self._regret, self._narrator
        )
        self._lease_ms = round(settings.lease_s * 1000)
        self._due_at = 0.0
        """When the next scheduled job may be due, in monotonic seconds."""
        self._more = True
        """Something may be waiting in a lane that no push will tell of."""
        self._full = False
        """The window was full when we last claimed, so more may be waiting."""

    def serve(self, stop: threading.Event) -> bool:
        """Serves until `stop` is set; True where everything has been given back."""
        self._broker.announce(b"")
        # What is pushed to the other lists of the lane is announced to us; the default list wakes us by itself.
        watched = (topology.LANE + topology.PRIORITY_SEPARATOR, topology.lane(""), topology.AGAIN)
        prefixes = [part for each in watched for part in ("PREFIX", each)]
        self._main.call("CLIENT", "TRACKING", "ON", "BCAST", "NOLOOP", *prefixes)
        self._model.restore(self._main.call("GET", topology.MODEL))
        self._broker.emit(event.encode(Event("router.online", self._incarnation)))
        self._narrator.beat(0, "online")
        remote_control = RemoteControl(self._url, self._settings, self._window, self._incarnation)
        log.info("router_online", router=self._incarnation, policy=self._planner.name)
        try:
            self._loop(stop)
        finally:
            remote_control.close()
            has_left = self._leave()
        return has_left

    def _loop(self, stop: threading.Event) -> None:
        tick_at, readable = 0.0, [self._main]
        while not stop.is_set():
            now = time.monotonic()
            if now >= tick_at:
                self._tick()
                tick_at = now + self._settings.heartbeat_s
            if now >= self._due_at:
                self._look_at_due()
            if self._main in readable or self._main.has_more:
                self._more |= bool(self._main.drain_pushes())
            self._more |= self._broker.is_full
            if self._more:
                self._claim(woken=False)
                self._place()
            self._ask()
            has_more = self._more or self._main.has_more or self._wake.has_more
            wait_s = 0.0 if has_more else min(tick_at, self._due_at) - time.monotonic()
            wait_s = max(_FULL_S if self._broker.is_full else 0.0, wait_s)
            readable, _, _ = select.select([self._wake, self._main, self._events.connection], [], [], wait_s)
            if self._wake in readable or self._wake.has_more:
                self._wake_up()
            if self._events.connection in readable:
                self._fold(self._events.answer())
            if readable:
                self._place()

    def _leave(self) -> bool:
        """Gives back what is still in the window, if the broker lets us; else our lease lapses and others do it."""
        self._wake.close()
        self._events.connection.close()
        try:
            self._broker.resign()
            self._broker.emit(event.encode(Event("router.offline", self._incarnation)))
            self._narrator.beat(0, "offline")
            log.info("router_offline", router=self._incarnation)
            return True
        except LeptonError as error:
            log.warning("router_left_claims", router=self._incarnation, reason=error.message)
            return False
        finally:
            self._main.close()

    # -- claim --------------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        self._events.ask()
        # Not while more waits, which the next claim takes in its order.
        if not self._broker.is_waking and not self._more and self._window.room > 0 and not self._broker.is_full:
            self._broker.ask_wake(self._wake)

    def _wake_up(self) -> None:
        """Takes the answer of the wake connection. A message that is alone goes from the wake claim to its device."""
        woken = self._broker.woke(self._wake)
        self._hear_peers()
        usable = [device for device in self._cluster.devices if device.share > 0]
        is_free = woken.is_all and not len(self._window) and all(map(self._credit.has_room, usable))
        if woken.message is not None and is_free:
            found = self._seen([woken.message])
            if self._stays_whole(found[0][1]):
                claim = self._window.wake_claim()
                self._window.hold(claim, [woken.message])
                self._admit(claim, found, may_split=False)
                # No peer is heard now: the device that had room must have it still, for nothing may wait in this claim.
                if len(self._window):
                    self._step(_STEP)
                return
        self._claim(woken=woken.message is not None)

    def _claim(self, *, woken: bool) -> None:
        """Claims what waits, up to the window; what the wake-up brought even beyond it."""
        self._more = self._full = False
        until = time.monotonic() + _CLAIM_S
        while woken or self._window.room > 0:
            claim, room = self._window.open_claim(Kind.NEW)
            limit = max(1, min(room, self._window.room))
            messages = self._broker.claim(Kind.NEW, claim.number, len(claim.messages), limit)
            woken = False
            self._read(claim, messages)
            waiting = sum(self._broker.back.values())
            came_back = sum(self._claim_back(kind, each) for kind, each in self._broker.back.items() if each)
            if came_back == waiting and len(messages) + came_back < limit:
                return
            if time.monotonic() > until:  # what is not due or has expired never fills the window
                self._more = True
                return
        self._full = True

    def _claim_back(self, kind: Kind, waiting: int) -> int:
        """Claims of what waits beside the lanes; returns how many messages that were."""
        if self._window.room <= 0:
            return 0
        claim, room = self._window.open_claim(kind)
        messages = self._broker.claim(kind, claim.number, len(claim.messages), min(waiting, room, self._window.room))
        self._read(claim, messages)
        return len(messages)

    def _read(self, claim: Claim, messages: Sequence[bytes]) -> None:
        """Bytes become jobs; what nobody could run, or was cancelled, ends at once."""
        self._window.hold(claim, messages)
        self._admit(claim, self._seen(messages))

    def _seen(self, messages: Iterable[bytes]) -> list[tuple[bytes, Incoming | Refused | Dead]]:
        now = self._broker.now()
        return [(message, intake.read(message, now)) for message in messages]

    def _admit(
        self, claim: Claim, found: list[tuple[bytes, Incoming | Refused | Dead]], *, may_split: bool = True
    ) -> None:
        now = self._broker.now()
        ids = [job for _, each in found if isinstance(each, Incoming) for job in each.ids]
        marked = self._broker.marked(ids) if self._broker.marks else set()
        too_many: list[tuple[bytes, int]] = []
        singly = 0
        for message, each in found if may_split else ():
            if isinstance(each, Incoming) and (count := len(each.ids)) > 1:
                most = self._bundles.most_together(claim.kind, each, marked, singly + count)
                singly += count if most == 1 else 0
                if most < count:
                    too_many.append((message, most))
        if too_many and (apart := self._bundles.split(claim, too_many)):
            found = [
                (part, each if part is message else intake.read(part, now))
                for message, each in found
                for part in apart.get(id(message), (message,))
            ]
        refused: list[tuple[bytes, Refused | Dead]] = []
        added: list[tuple[ClaimedJob, wire.Headers]] = []
        early: list[tuple[bytes, Incoming, float]] = []
        for message, read in found:
            each = read
            if isinstance(read, Incoming) and read.options.must_meet and claim.kind is Kind.NEW:
                each = judged(read, message, now, self._backlog(), self._cluster, self._model)
            elif isinstance(read, Incoming) and (error := self._cluster.gives_up(read.headers.task, read.options)):
                each = intake.refused(read, error)
            if not isinstance(each, Incoming):
                refused.append((message, each))
                continue
            headers, until = each.headers, each.waits_until(now)
            if until is not None and headers.id not in marked:
                early.append((message, each, until))
                continue
            if claim.kind is not Kind.NEW:  # it is on its former device no more, which would look full
                for its_id in each.ids:
                    self._cluster.finished(its_id)
            job = self._window.add(each.ids, headers.task, each.options, message, claim, each.deadline_at)
            added.append((job, headers))
        self._narrator.sent(added)
        if refused:
            self._endings.refuse(claim, refused)
        if early:
            self._endings.schedule(claim, early)
            self._due_at = 0.0
        self._endings.cancel([job for job, _ in added if job.id in marked and len(job.ids) == 1])
        self._endings.expire([job for job, _ in added if job.deadline_at is not None and job.deadline_at <= now])

    def _backlog(self) -> Backlog:
        return backlog_of(self._cluster, self._window, self._planner.typical_s)

    def _stays_whole(self, found: Incoming | Refused | Dead) -> bool:
        """Whether a message is no bundle, or one that nobody has to split."""
        if not isinstance(found, Incoming) or len(found.ids) == 1:
            return True
        count = len(found.ids)
        return not self._broker.marks and self._bundles.most_together(Kind.NEW, found, (), count) >= count

    def _set_apart(self, bundles: Iterable[ClaimedJob]) -> None:
        """The jobs of these bundles, which wait in the window, wait there one by one."""
        by_claim: dict[int, list[ClaimedJob]] = {}
        for each in bundles:
            by_claim.setdefault(id(each.claim), []).append(each)
        for here in by_claim.values():
            claim = here[0].claim
            parts = self._bundles.split(claim, [(each.message, 1) for each in here])
            self._window.remove(each for each in here if id(each.message) in parts)
            self._admit(claim, self._seen(chain.from_iterable(parts.values())))

    def _look_at_due(self) -> None:
        """Takes jobs whose time has come out of the schedule."""
        moved, next_s = self._broker.due()
        self._more |= moved > 0
        self._due_at = time.monotonic() + min(next_s, self._settings.heartbeat_s)

    # -- place and dispatch -------------------------------------------------------------------------------------

    def _place(self) -> None:
        """Places jobs, most urgent first, until no device has room for more."""
        while len(self._window):
            self._hear_peers()
            room = self._credit.jobs()
            is_deep = self._planner.wants(len(self._window), room)
            count = _STEP if is_deep else min(_STEP, room) or _STEP
            jobs, left = self._step(count, is_deep=is_deep)
            if not left and jobs == count < _STEP:  # they all wait for a device that is full, and others may not
                count = _STEP
                jobs, left = self._step(count)
            if not left or (left < jobs and count == _STEP):
                break
        self._more |= self._full and self._window.room > 0

    def _hear_peers(self) -> None:
        """Folds in what other routers have given to devices up to now, where there are others."""
        if self._peers:
            self._fold(self._events.catch_up(self._main))

    def _step(self, count: int, *, is_deep: bool = False) -> tuple[int, int]:
        """Looks at so many jobs and dispatches what has room; returns how many it looked at, and how many have left."""
        jobs = self._window.first(count, self._worth_placing())
        if homeless := [job for job in jobs if len(job.ids) > 1 and not self._can_run(job)]:
            self._set_apart(homeless)  # each is parked by itself
            jobs = self._window.first(count, self._worth_placing())
        left = self._placer.place(jobs, is_deep=is_deep)
        self._window.left(left)
        return min(count, _jobs_in(jobs)), _jobs_in(left)

    def _can_run(self, job: ClaimedJob) -> bool:
        return any(device.can_run(job.kernel, job.options.pin) for device in self._cluster.devices)

    def _worth_placing(self) -> Callable[[str, Pin], bool]:
        """Says of a kernel and a pin whether a device that can run both has room, or none can (and they are parked).

        The others stay out of the step, so that many jobs for a full device do not keep an idle one from theirs.
        """
        devices = self._cluster.devices
        free = [device for device in devices if self._credit.has_room(device)]

        def may_go(kernel: str, pin: Pin) -> bool:
            able = any(device.can_run(kernel, pin) for device in devices)
            return not able or any(device.can_run(kernel, pin) for device in free)

        return may_go

    # -- learn --------------------------------------------------------------------------------------------------

    def _fold(self, seen: Iterable[tuple[str, Event]]) -> None:
        changed = False
        asked: set[str] = set()
        for _, each in seen:
            learn(each, self._cluster, self._model)
            self._peers.heard(each)
            if each.type in ENDED:
                self._probes.ended(each.jobs)
                self._regret.ended(each)
            changed |= each.type in ("device.online", "device.offline", "device.quarantined")
            if each.type in ("job.retried", "job.released"):
                self._due_at = 0.0
            if each.type == "job.cancel_asked":
                asked.update(each.jobs)
        if changed or self._cluster.recovered:
            self._refresh()
        if asked:
            self._cancel_asked(asked)

    def _cancel_asked(self, asked: set[str]) -> None:
        """Ends those jobs that we hold; those that are parked are claimed again, which finds their marks."""
        self._set_apart([job for job in self._window.jobs() if len(job.ids) > 1 and not asked.isdisjoint(job.ids)])
        ours = [job for job in self._window.jobs() if job.id in asked and len(job.ids) == 1]
        self._endings.cancel(ours)
        others = sorted(asked.difference(job.id for job in ours))
        for at in range(0, len(others), _ASKED_AT_ONCE):
            moved, _ = self._broker.due(others[at : at + _ASKED_AT_ONCE])
            self._more |= moved > 0
        known, _ = (
            self._broker.known(others, {noted_in(job, self._broker.now()) for job in others}) if others else ({}, set())
        )
        placements = {placement.job: placement for placement in _placements(known.values())}
        kernels = {each.kernel for each in placements.values() if each.state == "parked"}
        if len(placements) < len(others):  # parked long ago, perhaps: its placement is looked for in vain
            kernels = self._broker.parked_kernels()
        for kernel in kernels:
            self._more |= self._broker.unpark_jobs(kernel, asked) > 0

    def _tick(self) -> None:
        if not self._broker.renew():
            raise Fenced(f"the lease of {self._incarnation} has lapsed")
        recovered = self._broker.recover(self._sequels.after)
        if recovered.messages:
            log.warning("messages_recovered", count=recovered.messages, dead=recovered.dead)
        for kernel in self._broker.overdue():
            self._broker.unpark(kernel)
        self._endings.expire(self._window.expired(self._broker.now()))
        self._refresh()
        self._peers.alive(routers(self._main))
        self._planner.share = 1 / (1 + len(self._peers))
        names = [device.name for device in self._cluster.devices]
        if moved := self._broker.take_back(names):
            log.warning("messages_taken_back", count=moved, live=names)
        depths = self._broker.depths(names)
        # What came into a queue before it was looked at must be known when the rest of it is taken to be older.
        self._fold(self._events.catch_up(self._main))
        for name, depth in zip(names, depths, strict=True):
            self._cluster.reconcile(name, depth)
        told = ("SET", topology.backlog(self._incarnation), _MSGPACK.encode(self._backlog()), "PX", self._lease_ms)
        # A broker that is full does without.
        self._main.receive(self._main.send([told, *self._regret.told()]))
        self._narrator.beat(len(self._window))
        self._more = True

    def _refresh(self) -> None:
        """Looks who is alive, and takes jobs out of the parking that can run now."""
        if not self._cluster.refresh(announcements(self._main)):
            return
        self._probes.refresh()
        log.info("fleet_changed", devices={device.name: device.slots for device in self._cluster.devices})
        for kernel in self._broker.parked_kernels():
            if self._cluster.offer(kernel) is not None:
                log.info("jobs_unparked", kernel=kernel, jobs=self._broker.unpark(kernel))
                self._more = True


def _jobs_in(waiting: Iterable[ClaimedJob]) -> int:
    return sum(len(each.ids) for each in waiting)


def _placements(known: Iterable[bytes]) -> Iterator[Placement]:
    for raw in known:
        with suppress(msgspec.DecodeError):  # anybody with the broker's password may write there
            yield _PLACEMENT.decode(raw)
