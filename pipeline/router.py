"""The router: claim, place, dispatch, learn. One thread, one incarnation, woken by pushes and never by polling.

It wakes on a message on a lane, on an event (a commit gives a device room and teaches the cost model), and once a
heartbeat to renew its lease. The thinking is in `pricing` and in the policy; this file only moves.
"""

from __future__ import annotations

import math
import secrets
import select
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from itertools import chain

import msgspec
import structlog

from lepton_ai import bundle, event, topology, wire
from lepton_ai.errors import BrokerUnavailable, Fenced, LeptonError
from lepton_ai.event import Event
from lepton_ai.job import Candidate, Placement
from lepton_ai.placement import policies
from lepton_ai.placement.costs import CostModel
from lepton_ai.placement.problem import UNPLACED, Policy
from lepton_ai.settings import Settings
from pipeline import intake
from pipeline.bundles import Bundles, counted
from pipeline.cluster import Cluster, ServedDevice
from pipeline.endings import Endings, leave, noted_in
from pipeline.intake import Dead, Incoming, Refused
from pipeline.node import Narrator, RemoteControl
from pipeline.notes import Note, packed
from pipeline.pricing import price
from pipeline.sequels import Sequels
from pipeline.telemetry import learn
from pipeline.window import Claim, ClaimedJob, Window
from queues import functions, recovery
from queues.broker import Broker, Kind, announcements
from queues.connection import Connection
from queues.event_stream import EventStream
from queues.steps import Dispatch

__all__ = ["Router"]

#: Jobs that are priced and placed in one step; the rest of a deep window waits for the next.
_STEP = 512
_RETRY_S = (0.05, 2.0)
#: A device that has been filled is filled again once it has less than this part of what it may have.
_REFILL = 0.75
#: So long it claims at a stretch before it places what it has and renews its lease.
_CLAIM_S = 0.05
#: How often a broker whose memory is full is asked, which tells nobody of anything.
_FULL_S = 0.1
#: Jobs that are asked to be cancelled are looked for among the scheduled ones so many at a time.
_ASKED_AT_ONCE = 1024
_PLACEMENT = msgspec.msgpack.Decoder(Placement)

log = structlog.get_logger()


class Router:
    """Runs until `stop` is set, session after session: one ends when the broker or its claims are lost."""

    def __init__(self, settings: Settings, url: str, policy: Policy | None = None) -> None:
        self._settings = settings
        self._url = url
        self._policy = policy or policies.load(settings.policy)
        self._model = CostModel()
        self._left: list[str] = []
        """Earlier incarnations of ours whose sessions ended without giving back what they had claimed."""

    def run(self, stop: threading.Event) -> None:
        """Serves session after session until `stop` is set."""
        pause_s = _RETRY_S[0]
        while not stop.is_set():
            try:
                self._give_back()
                session = _Session(self._settings, self._url, self._policy, self._model)
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


class _Placed(msgspec.Struct):
    """What one step gives to one device."""

    messages: dict[str, list[bytes]]
    """By kernel, but for suspects."""
    jobs: list[ClaimedJob]
    seconds: list[float]
    """[job]: predicted transfer and run time."""


class _Session:
    def __init__(self, settings: Settings, url: str, policy: Policy, model: CostModel) -> None:
        self._settings = settings
        self._url = url
        self._policy = policy
        self._model = model
        self.incarnation = self._incarnation = f"router-{secrets.token_hex(8)}"
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
        self._filled: set[str] = set()
        """Devices that have been filled, and are drawing on it."""
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
        log.info("router_online", router=self._incarnation, policy=self._policy.name)
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
        devices = self._cluster.devices
        is_free = woken.is_all and not len(self._window) and all(map(self._has_room, devices))
        if woken.message is not None and is_free:
            found = self._seen([woken.message])
            if self._stays_whole(found[0][1]):
                claim = self._window.wake_claim()
                self._window.hold(claim, [woken.message])
                self._admit(claim, found, may_split=False)
                self._place()
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
        for message, each in found:
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
            count = min(_STEP, self._room()) or _STEP
            jobs, left = self._step(count)
            if not left and jobs == count < _STEP:  # they all wait for a device that is full, and others may not
                count = _STEP
                jobs, left = self._step(count)
            if not left or (left < jobs and count == _STEP):
                break
        self._more |= self._full and self._window.room > 0

    def _step(self, count: int) -> tuple[int, int]:
        """Looks at so many jobs and dispatches what has room; returns how many it looked at, and how many have left."""
        jobs = self._window.first(count, self._worth_placing())
        if homeless := [job for job in jobs if len(job.ids) > 1 and not self._can_run(job)]:
            self._set_apart(homeless)  # each is parked by itself
            jobs = self._window.first(count, self._worth_placing())
        left = self._dispatch(jobs)
        self._window.left(left)
        return min(count, _jobs_in(jobs)), _jobs_in(left)

    def _can_run(self, job: ClaimedJob) -> bool:
        return any(device.can_run(job.kernel, job.options.device) for device in self._cluster.devices)

    def _worth_placing(self) -> Callable[[str, str | None], bool]:
        """Says of a kernel and a pin whether a device that can run both has room, or none can (and they are parked).

        The others stay out of the step, so that many jobs for a full device do not keep an idle one from theirs.
        """
        devices = self._cluster.devices
        free = [device for device in devices if self._has_room(device)]

        def may_go(kernel: str, pin: str | None) -> bool:
            able = any(device.can_run(kernel, pin) for device in devices)
            return not able or any(device.can_run(kernel, pin) for device in free)

        return may_go

    def _dispatch(self, jobs: Sequence[ClaimedJob]) -> list[ClaimedJob]:
        pricing = price(jobs, self._cluster, self._model)
        plan = self._policy.place(pricing.problem)
        devices, now = self._cluster.devices, self._broker.now()
        step = Dispatch({}, {})
        left: list[ClaimedJob] = []
        placed = [_Placed({}, [], []) for _ in devices]
        notes: dict[tuple[str, int, int, bool], Note] = {}
        ready = pricing.problem.ready.tolist()
        waits = [packed(each) for each in ready]
        seconds, wait = pricing.problem.seconds.tolist(), plan.wait.tolist()
        for at, (job, kind, chosen) in enumerate(zip(jobs, pricing.kinds, plan.device.tolist(), strict=True)):
            if chosen != UNPLACED and not self._has_room(devices[chosen]):
                ready[chosen] += seconds[at][chosen] / devices[chosen].capacity
                waits[chosen] = packed(ready[chosen])
                continue
            alike = (job.kernel, kind, chosen, job.sent_at > 0)
            if (note := notes.get(alike)) is None:
                note = notes[alike] = Note(self._placement(job, pricing.candidates[kind], chosen, now))
            notes_here = step.placements.setdefault(noted_in(job.id, now), {})
            if (shared := bundle.noted_as(job.id, job.options)) is not None:
                notes_here[shared] = bundle.shared_note(note.of(job.id, packed(wait[at]), waits), len(job.ids))
            else:
                notes_here |= {its_id: note.of(its_id, packed(wait[at]), waits) for its_id in job.ids}
            left.append(job)
            if len(job.ids) > 1 and job.claim.kind is Kind.NEW:
                counted(step, job)
            if chosen == UNPLACED:
                self._cluster.finished(job.id)  # it may have come back from a device that died
                (step.parked_alone if job.alone else step.parked).setdefault(job.kernel, []).append(job.message)
                if job.deadline_at is not None:
                    step.deadlines[job.kernel] = min(job.deadline_at, step.deadlines.get(job.kernel, job.deadline_at))
                continue
            device, need_s, here = devices[chosen], seconds[at][chosen], placed[chosen]
            each_s = need_s / len(job.ids)
            ready[chosen] += need_s / device.capacity
            waits[chosen] = packed(ready[chosen])
            if job.alone:
                step.alone.setdefault(device.name, []).append(job.message)
            else:
                here.messages.setdefault(job.kernel, []).append(job.message)
            here.jobs.append(job)
            here.seconds += [each_s] * len(job.ids)
            for its_id in job.ids:
                self._cluster.dispatched(its_id, device.name, each_s, 1 / len(job.ids))
        if left:
            going = {device.name: here for device, here in zip(devices, placed, strict=True) if here.jobs}
            self._send(step, left, going)
        return left

    def _send(self, step: Dispatch, left: Sequence[ClaimedJob], placed: Mapping[str, _Placed]) -> None:
        leave(step, ((job.claim, job.message) for job in left))
        events = []
        for device, here in placed.items():
            if here.messages:  # those of one kernel side by side, so that a worker can batch them
                step.queued[device] = list(chain.from_iterable(here.messages.values()))
            jobs = tuple([its_id for job in here.jobs for its_id in job.ids])
            events.append(
                Event("job.placed", self._incarnation, device=device, jobs=jobs, data={"seconds": here.seconds})
            )
        count = sum(_jobs_in(here.jobs) for here in placed.values())
        step.counts |= {"placed": count, "parked": _jobs_in(left) - count}
        if count < _jobs_in(left):
            going = {id(job) for here in placed.values() for job in here.jobs}
            parked = [job for job in left if id(job) not in going]
            events.append(Event("job.parked", self._incarnation, jobs=tuple(job.id for job in parked)))
            log.warning("jobs_parked", jobs=len(parked), kernels=sorted({job.kernel for job in parked}))
        step.event = event.encode(*events)
        step.told = self._narrator.placed({device: here.jobs for device, here in placed.items()})
        self._broker.dispatch(step)

    def _has_room(self, device: ServedDevice) -> bool:
        """A device may have `credit_s` of predicted work a slot, but always two jobs, and never over two batches.

        One that has all of that is left to work some of it off, so that it is sent many jobs at a time.
        """
        if device.share <= 0:
            return False
        name, slots, settings = device.name, device.capacity, self._settings
        jobs = self._cluster.outstanding_jobs(name)
        if jobs < 2 * slots:
            return True
        of_jobs = jobs / (2 * settings.batch_jobs * slots)
        share = max(of_jobs, self._cluster.outstanding_s(name) / (settings.credit_s * slots))
        if share >= 1:
            self._filled.add(name)
        elif share <= _REFILL:
            self._filled.discard(name)
        return name not in self._filled

    def _room(self) -> int:
        """How many more jobs devices may have, if they take as long as those that each has already."""
        found = 0
        for device in self._cluster.devices:
            if not self._has_room(device):
                continue
            jobs, seconds = self._cluster.outstanding_jobs(device.name), self._cluster.outstanding_s(device.name)
            room = int(2 * self._settings.batch_jobs * device.capacity) - jobs
            if jobs and seconds > 0:
                room = min(room, int((self._settings.credit_s * device.capacity - seconds) / seconds * jobs) + 1)
            found += max(room, math.ceil(2 * device.capacity) - jobs)
        return found

    def _placement(self, job: ClaimedJob, candidates: tuple[Candidate, ...], chosen: int, now: float) -> Placement:
        """Where a job goes and why, as if it had not to wait there."""
        if chosen == UNPLACED:
            return self._park(job, candidates, now)
        best = candidates[chosen]
        able = sum(candidate.estimate is not None for candidate in candidates)
        reason = f"finishes first of {able} able devices" if able > 1 else "the only device that can run it"
        return Placement(
            job.id,
            job.kernel,
            "placed",
            reason,
            now,
            self._incarnation,
            best.device,
            best.estimate,
            candidates,
            self._policy.name,
            job.sent_at > 0,
        )

    def _park(self, job: ClaimedJob, candidates: tuple[Candidate, ...], now: float) -> Placement:
        pinned = f" on {job.options.device}" if job.options.device else ""
        reason = f"no live device can run {job.kernel}{pinned}; it waits for one that announces it"
        if beyond := [each for each in self._cluster.devices if each.serves(job.kernel, job.options.device)]:
            told = "; ".join(f"{each.name}: {each.reason}" for each in beyond)
            reason = f"every device that can run it is beyond its limits, and it waits for one to come back ({told})"
        return Placement(job.id, job.kernel, "parked", reason, now, self._incarnation, candidates=candidates)

    # -- learn --------------------------------------------------------------------------------------------------

    def _fold(self, seen: Iterable[tuple[str, Event]]) -> None:
        changed = False
        asked: set[str] = set()
        for _, each in seen:
            learn(each, self._cluster, self._model)
            changed |= each.type in ("device.online", "device.offline")
            if each.type == "job.retried":
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
        names = [device.name for device in self._cluster.devices]
        if moved := self._broker.take_back(names):
            log.warning("messages_taken_back", count=moved, live=names)
        for name, depth in zip(names, self._broker.depths(names), strict=True):
            self._cluster.reconcile(name, depth)
        self._narrator.beat(len(self._window))
        self._more = True

    def _refresh(self) -> None:
        """Looks who is alive, and takes jobs out of the parking that can run now."""
        if not self._cluster.refresh(announcements(self._main)):
            return
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
