"""The message path in any order of its steps, deaths and lost replies, against a model made of dictionaries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from lepton_ai import bundle, results, topology, wire
from lepton_ai.bundle import bundled
from lepton_ai.direct_protocol import push_commands, writer
from lepton_ai.errors import Fenced, JobCancelled, JobExpired, KernelFailed, TimeLimitExceeded
from lepton_ai.identity import run_of
from lepton_ai.job import Options
from lepton_ai.parcel import Blobs
from lepton_ai.settings import Settings
from lepton_ai.terms import Terms
from queues import functions
from queues.broker import LISTS_EACH, Broker, Kind
from queues.connection import Connection
from queues.steps import Commit, DeadLetter, Dispatch, Outcome

#: A lease lapses where the machine says so, not on a busy host; and a job may die twice.
VALUES = Settings(lease_s=6000, heartbeat_s=3000, attempts=2)
NOW = 0.001
KERNEL = "a.b"
NEVER = 4e9
TENANT = topology.lane("tenant")
ROUTERS, WORKERS = ("router0", "router1"), ("worker0", "worker1")
BACK = {Kind.AGAIN: topology.AGAIN, Kind.ALONE: topology.ALONE}
#: Where a router sends a message.
PLACES = [*["cpu", "gpu"] * 4, "rest", "parked", "later", "now", "unreadable", "failed", "cancelled", "expired"]
#: How a worker ends a job.
ENDINGS = [*["succeeded", "retried"] * 2, "failed", "cancelled", "expired", "dead", "ignored"]
#: Device queues, and the device of each and whether it is for suspects.
QUEUES = {
    name(device): (device, name is topology.alone_queue)
    for device in ("cpu", "gpu")
    for name in (topology.device_queue, topology.alone_queue)
}
ERRORS = {
    "failed": KernelFailed("it raised"),
    "cancelled": JobCancelled("nobody wants it"),
    "expired": JobExpired("it is late"),
    "dead": TimeLimitExceeded("too long"),
}


class Holder(msgspec.Struct):
    """One incarnation as the model knows it."""

    broker: Broker
    alive: bool = True


def record(job: str, status: str) -> bytes:
    """The record that goes with a status of ours."""
    if status == "succeeded":
        return results.encode(results.success(job, {"y": 1}, None), "json")
    if status == "retried":
        return results.encode(results.retrying(job, ERRORS["failed"], None), "json")
    return results.encode(results.failure(job, ERRORS[status]), "json")


@cache
def jobs_of(message: bytes) -> tuple[str, ...]:
    headers = wire.read_envelope(message).headers
    return bundle.ids_of(message, headers, wire.read_options(headers))


def job_of(message: bytes) -> str:
    """The job of a message; of a bundle the first."""
    return jobs_of(message)[0]


def extra_of(messages: Iterable[bytes]) -> int:
    """How many more jobs than messages these are."""
    return sum(len(jobs_of(each)) - 1 for each in messages)


def possible(**arguments: st.SearchStrategy[Any] | None) -> Callable[[Any], Any]:
    """Marks a step of the machine, with what it is called with; None for the data from which it draws itself."""

    def mark(method: Any) -> Any:
        method.arguments, method.when = arguments, lambda _: True
        return method

    return mark


def when(condition: Callable[[Any], object]) -> Callable[[Any], Any]:
    """When a step may be taken at all."""

    def mark(method: Any) -> Any:
        method.when = condition
        return method

    return mark


#: The steps, and how often each is among those to choose from.
STEPS = {
    "push": 2,
    "push_bundle": 2,
    "accept": 2,
    "memory": 1,
    "claim": 4,
    "claim_back": 3,
    "split": 2,
    "dispatch": 6,
    "unpark": 1,
    "unpark_one": 1,
    "due": 1,
    "due_at_once": 1,
    "take_back": 1,
    "take": 6,
    "commit": 4,
    "release": 1,
    "kill": 1,
    "die_at_work": 3,
    "die_with_claims": 2,
    "resign": 1,
    "recover": 3,
    "cancel": 1,
    "a_dead_one_wakes_and_goes_on": 1,
}


def _machine(url: str) -> type[RuleBasedStateMachine]:
    class MessagePath(RuleBasedStateMachine):
        """Two routers and two workers over a dictionary of the lists: the broker must always be equal to it."""

        def __init__(self) -> None:
            super().__init__()
            self.connection = Connection(url, "model")
            self.connection.call("CONFIG", "SET", "maxmemory", 0)
            self.connection.call("FLUSHALL")
            self.full = False
            self.lists: dict[str, list[bytes]] = {}
            self.scheduled: dict[str, tuple[float, bytes]] = {}
            self.results: dict[str, bytes] = {}
            self.ended: set[str] = set()  # those whose result is ignored too
            self.retrying: dict[str, bytes] = {}
            self.replies: Counter[str] = Counter()
            self.attempts: Counter[str] = Counter()
            self.counts: Counter[str] = Counter()
            self.letters: list[tuple[str, str, bytes]] = []
            self.marks: set[str] = set()
            self.devices: set[str] = set()
            self.lanes: set[str] = set()
            self.extra: Counter[str] = Counter()  # by the lane: jobs beyond messages in it or its first claims
            self.ids: list[str] = []
            self.jobs = self.runs = self.made = 0
            self.holders: dict[str, Holder] = {}
            for role in (*ROUTERS, *WORKERS):
                self.start(role)

        def teardown(self) -> None:
            self.connection.call("CONFIG", "SET", "maxmemory", 0)
            for holder in self.holders.values():
                holder.broker.connection.close()
            self.connection.close()

        def start(self, role: str) -> None:
            """A new incarnation in a role; the old one is remembered, and its connections stay open."""
            self.made += 1
            if role in self.holders:
                self.holders[f"{role}-{self.made}"] = self.holders.pop(role)
            incarnation = f"{role}-{self.made}"
            broker = Broker(Connection(url, incarnation), incarnation, VALUES)
            broker.announce(b"")
            self.holders[role] = Holder(broker)

        @rule(data=st.data())
        def step(self, data: st.DataObject) -> None:
            """One of the steps below. A rule for each would leave most examples without the few that matter."""
            names = [name for name, often in STEPS.items() if getattr(self, name).when(self) for _ in range(often)]
            method = getattr(self, data.draw(st.sampled_from(names), label="step"))
            drawn = {
                name: data if strategy is None else data.draw(strategy, label=name)
                for name, strategy in method.arguments.items()
            }
            method(**drawn)

        def at(self, key: str) -> list[bytes]:
            return self.lists.setdefault(key, [])

        def claims(self, incarnation: str, number: int) -> list[str]:
            return [topology.claim(incarnation, number, kind) for kind in Kind]

        def batches(self, incarnation: str, number: int) -> list[str]:
            return [topology.held(incarnation, number)]

        def having(self, lists: Callable[[str, int], list[str]]) -> list[tuple[str, int]]:
            """The living, by role and number, that have something in these lists of theirs."""
            return [
                (role, number)
                for role in (*ROUTERS, *WORKERS)
                for number in (0, 1)
                if any(map(self.at, lists(self.holders[role].broker.incarnation, number)))
            ]

        def pull(self, key: str) -> list[bytes]:
            return self.lists.pop(key, [])

        def finish(self, job: str, status: str, told: bytes) -> bool:
            """What `finish` in functions.lua does; False for a duplicate."""
            self.attempts.pop(job, None)
            if job in self.ended:
                self.counts["duplicate"] += 1
                return False
            self.ended.add(job)
            self.results[job] = told
            self.retrying.pop(job, None)
            self.counts[status] += 1
            return True

        def hold_back(self, job: str, due_at: float, message: bytes) -> None:
            if job in self.scheduled:
                self.counts["duplicate"] += 1
            else:
                self.scheduled[job] = (due_at, message)

        # -- a producer ---------------------------------------------------------------------------------------

        def message(self) -> bytes:
            self.jobs += 1
            self.ids.append(f"job-{self.jobs}")
            return wire.envelope(self.ids[-1], KERNEL, {"n": 1}, Options())

        @when(lambda self: not self.full)
        @possible(priority=st.integers(1, 9), twice=st.booleans())
        def push(self, priority: int, twice: bool) -> None:
            message, key = self.message(), topology.lane_list(priority)
            for _ in range(1 + twice):  # a client whose reply was lost sends the same job again
                self.connection.call("LPUSH", key, message)
                self.at(key).append(message)

        @when(lambda self: not self.full)
        @possible(count=st.integers(4, 9), tenant=st.sampled_from([None, "tenant"]), twice=st.booleans())
        def push_bundle(self, count: int, tenant: str | None, twice: bool) -> None:
            self.runs += 1
            jobs = run_of(f"00000000-0000-7000-8000-{self.runs:09x}000", count)
            self.ids += jobs
            write, lane = writer(KERNEL, Terms(), tenant, Blobs(0)), topology.lane(tenant)
            ((message, _),) = bundled([write(job, {"n": 1}) for job in jobs])  # type: ignore[misc]
            for _ in range(1 + twice):
                self.connection.many([("MULTI",), *push_commands([message], Terms(), tenant, count - 1), ("EXEC",)])
                self.at(lane).append(message)
                self.extra[lane] += count - 1
            self.lanes |= {lane} - {topology.LANE}

        @possible(tenant=st.booleans(), count=st.integers(1, 3), priority=st.integers(1, 9))
        def accept(self, tenant: bool, count: int, priority: int) -> None:
            lane = TENANT if tenant else topology.LANE
            key = topology.lane_list(priority, lane)
            messages = [self.message() for _ in range(count)]
            jobs = [word for each in messages for word in (key, job_of(each), "", "", "", each)]
            command = functions.call("accept", (), (60, 100, 10**6, 0, 10**6, 0, lane, "", count, *jobs))
            (reply,) = self.connection.receive(self.connection.send([command]))
            if self.full:
                assert functions.is_full(reply)
                return
            assert reply == [1] * count
            self.at(key).extend(messages)
            self.lanes |= {lane} - {topology.LANE}

        @possible(full=st.sampled_from([False, False, True]))
        def memory(self, full: bool) -> None:
            self.connection.call("CONFIG", "SET", "maxmemory", int(full))
            self.full = full

        # -- routers ------------------------------------------------------------------------------------------

        @when(lambda self: any(self.at(name) for name in (*topology.lane_lists(), *topology.lane_lists(TENANT))))
        @possible(role=st.sampled_from(ROUTERS), number=st.integers(0, 1), limit=st.integers(1, 5))
        def claim(self, role: str, number: int, limit: int) -> None:
            broker = self.holders[role].broker
            mine = self.at(topology.claim(broker.incarnation, number))
            back = {kind: len(self.at(source)) for kind, source in BACK.items()}
            room = max(0, limit - sum(back.values()))
            lists = [name for lane in (topology.LANE, *self.lanes) for name in topology.lane_lists(lane)]
            waiting = sum(len(self.at(name)) for name in lists)
            found = broker.claim(Kind.NEW, number, len(mine), limit)
            assert broker.back == back
            assert len(found) == min(max(1, room) if self.full else room, waiting)
            assert set(broker._lanes) == {topology.LANE} | self.lanes
            for message in found:  # each from the head of the list where it waited
                source = next(name for name in lists if self.at(name)[:1] == [message])
                self.at(source).pop(0)
            mine += found

        @when(lambda self: any(self.at(source) for source in BACK.values()))
        @possible(role=st.sampled_from(ROUTERS), number=st.integers(0, 1), limit=st.integers(1, 5), data=None)
        def claim_back(self, role: str, number: int, limit: int, data: st.DataObject) -> None:
            kind = data.draw(st.sampled_from([kind for kind, source in BACK.items() if self.at(source)]))
            broker = self.holders[role].broker
            mine = self.at(topology.claim(broker.incarnation, number, kind))
            source = self.at(BACK[kind])
            expected, self.lists[BACK[kind]] = source[:limit], source[limit:]
            assert broker.claim(kind, number, len(mine), limit) == expected
            mine += expected

        @when(lambda self: self.having(self.claims))
        @possible(most=st.integers(1, 4), data=None)
        def split(self, most: int, data: st.DataObject) -> None:
            """A router splits what bundles a claim of its has."""
            role, number = data.draw(st.sampled_from(self.having(self.claims)))
            broker = self.holders[role].broker
            for kind in Kind:
                key = topology.claim(broker.incarnation, number, kind)
                before = self.at(key)
                parts = {id(each): bundle.split(each, most) for each in before if len(jobs_of(each)) > most}
                if not parts:
                    continue
                after = [part for each in before for part in parts.get(id(each), [each])]
                step = Dispatch({key: len(before)}, {key: after})
                for message in before:
                    more = len(parts.get(id(message), [message])) - 1
                    if kind is Kind.NEW:
                        step.bundled[wire.lane_of(message)] = step.bundled.get(wire.lane_of(message), 0) + more
                    else:
                        step.counts["bundled"] = step.counts.get("bundled", 0) - more
                broker.dispatch(step)
                self.extra.subtract(step.bundled)
                self.counts.update(step.counts)
                self.lists[key] = after

        @when(lambda self: self.having(self.claims))
        @possible(chosen=st.lists(st.sampled_from(PLACES), min_size=6, max_size=6), data=None)
        def dispatch(self, chosen: list[str], data: st.DataObject) -> None:
            self.dispatch_from(data.draw(st.sampled_from(self.having(self.claims)))[0], chosen)

        def dispatch_from(self, role: str, chosen: list[str]) -> None:
            broker = self.holders[role].broker
            step = Dispatch(
                {},
                {},
                leaving={},
                queued={},
                alone={},
                parked={},
                parked_alone={},
                scheduled=[],
                dead=[],
                rejected=[],
                counts={},
            )
            step.are_oldest = True
            going = iter(chosen * 100)
            for kind in Kind:
                for number in (0, 1):
                    self._dispatch_from(topology.claim(broker.incarnation, number, kind), kind, step, going)
            # In the order in which the transaction does it.
            for queue, messages in [
                *((topology.device_queue(device), found) for device, found in step.queued.items()),
                *((topology.alone_queue(device), found) for device, found in step.alone.items()),
                *((topology.parked(kernel), found) for kernel, found in step.parked.items()),
                *((topology.parked_alone(kernel), found) for kernel, found in step.parked_alone.items()),
            ]:
                self.at(queue).extend(messages)
            self.devices |= step.queued.keys() | step.alone.keys()
            for job, due_at, message in step.scheduled:
                self.hold_back(job, due_at, message)
            for letter in step.dead:
                self.letters.append((letter.job, letter.code, letter.message))
                self.counts["dead"] += 1
            for outcome in step.rejected:
                self.finish(outcome.job, outcome.status, outcome.record)
            self.counts.update(step.counts)
            self.extra.subtract(step.bundled)
            self.marks -= {outcome.job for outcome in step.rejected if outcome.status == "cancelled"}
            broker.dispatch(step)

        def _dispatch_from(self, key: str, kind: Kind, step: Dispatch, going: Any) -> None:
            messages = self.pull(key)
            if not messages:
                return
            step.claims[key] = len(messages)
            step.rests[key], step.leaving[key] = [], []
            self._sort(messages, key, kind, step, going)
            step.are_oldest &= messages[: len(step.leaving[key])] == step.leaving[key]

        def _sort(self, messages: list[bytes], key: str, kind: Kind, step: Dispatch, going: Any) -> None:
            for message in messages:
                where, job, extra = next(going), job_of(message), extra_of([message])
                if extra and where not in ("rest", "parked"):
                    where = "gpu"  # whoever would end one of its jobs, or put it aside, has split it
                (step.rests if where == "rest" else step.leaving)[key].append(message)
                if where == "rest":
                    self.at(key).append(message)
                elif where in ("cpu", "gpu"):
                    (step.alone if kind is Kind.ALONE else step.queued).setdefault(where, []).append(message)
                elif where == "parked":
                    (step.parked_alone if kind is Kind.ALONE else step.parked).setdefault(KERNEL, []).append(message)
                elif where in ("later", "now"):
                    step.scheduled.append((job, NEVER if where == "later" else 1.0, message))
                elif where == "unreadable":
                    step.dead.append(DeadLetter(job, "", "unreadable", "because", 0, message))
                else:
                    step.rejected.append(Outcome(job, where, record(job, where)))
                if where != "rest" and kind is Kind.NEW:
                    step.counts["accepted"] = step.counts.get("accepted", 0) + 1 + extra
                    step.counts["bundled"] = step.counts.get("bundled", 0) + extra
                    step.bundled[wire.lane_of(message)] = step.bundled.get(wire.lane_of(message), 0) + extra

        @when(lambda self: self.at(topology.parked(KERNEL)) or self.at(topology.parked_alone(KERNEL)))
        @possible()
        def unpark(self) -> None:
            moved, suspects = self.pull(topology.parked(KERNEL)), self.pull(topology.parked_alone(KERNEL))
            assert self.holders["router0"].broker.unpark(KERNEL) == len(moved) + len(suspects)
            self.at(topology.AGAIN).extend(moved)
            self.at(topology.ALONE).extend(suspects)

        @when(lambda self: self.at(topology.parked(KERNEL)) or self.at(topology.parked_alone(KERNEL)))
        @possible(data=None)
        def unpark_one(self, data: st.DataObject) -> None:
            lists = {topology.parked(KERNEL): topology.AGAIN, topology.parked_alone(KERNEL): topology.ALONE}
            job = data.draw(st.sampled_from(sorted({job_of(each) for source in lists for each in self.at(source)})))
            count = 0
            for source, target in lists.items():
                moved = [each for each in self.at(source) if job_of(each) == job]
                self.lists[source] = [each for each in self.at(source) if job_of(each) != job]
                self.at(target).extend(moved)
                count += len(moved)
            assert self.holders["router1"].broker.unpark_jobs(KERNEL, {job, "unknown"}) == count

        @when(lambda self: self.scheduled)
        @possible()
        def due(self) -> None:
            ready = sorted(job for job, (due_at, _) in self.scheduled.items() if due_at < NEVER)
            moved = [self.scheduled.pop(job)[1] for job in ready]
            assert self.holders["router1"].broker.due()[0] == len(moved)
            self.at(topology.AGAIN).extend(moved)

        @when(lambda self: self.scheduled)
        @possible(data=None)
        def due_at_once(self, data: st.DataObject) -> None:
            job = data.draw(st.sampled_from(sorted(self.scheduled)))
            _, message = self.scheduled.pop(job)
            assert self.holders["router0"].broker.due([job, "unknown"])[0] == 1
            self.at(topology.AGAIN).append(message)

        @possible(live=st.sets(st.sampled_from(["cpu", "gpu"])))
        def take_back(self, live: set[str]) -> None:
            gone = sorted(self.devices - live)
            count = 0
            before = self.lengths()
            for name, target in ((topology.device_queue, topology.AGAIN), (topology.alone_queue, topology.ALONE)):
                expected = [message for device in gone for message in self.pull(name(device))]
                self.at(target).extend(expected)
                count += len(expected)
            assert self.holders["router0"].broker.take_back(live) == count
            self.adopt_order(before)

        # -- workers ------------------------------------------------------------------------------------------

        @when(lambda self: any(map(self.at, QUEUES)))
        @possible(role=st.sampled_from(WORKERS), limit=st.integers(1, 4), data=None)
        def take(self, role: str, limit: int, data: st.DataObject) -> None:
            name = data.draw(st.sampled_from([queue for queue in QUEUES if self.at(queue)]))
            device, alone = QUEUES[name]
            broker, slot = self.holders[role].broker, int(alone)
            held, queue = self.at(topology.held(broker.incarnation, slot)), self.at(name)
            limit = 1 if alone else limit
            more = (0 if self.full else 1) if held else limit
            expected, self.lists[name] = [*held, *queue[:more]], queue[more:]
            self.lists[topology.held(broker.incarnation, slot)] = expected
            assert broker.take(device, slot, limit, 1, NOW, alone=alone) == expected

        @when(lambda self: self.having(self.batches))
        @possible(
            chosen=st.lists(st.sampled_from(ENDINGS), min_size=4, max_size=4),
            follow=st.booleans(),
            lost=st.booleans(),
            data=None,
        )
        def commit(self, chosen: list[str], follow: bool, lost: bool, data: st.DataObject) -> None:
            role, slot = data.draw(st.sampled_from(self.having(self.batches)))
            broker = self.holders[role].broker
            held = self.pull(topology.held(broker.incarnation, slot))
            outcomes, pushes, retries, dead, duplicates = [], [], [], [], []
            jobs = [
                (job, single) for each in held for job, single in zip(jobs_of(each), bundle.singles(each), strict=True)
            ]
            ways: dict[str, str] = {}  # of two copies in a batch neither is before the other
            for (job, message), drawn in zip(jobs, chosen * 100, strict=False):
                how = ways.setdefault(job, drawn)
                told = b"" if how == "ignored" else record(job, how)
                status = "succeeded" if how == "ignored" else how
                outcomes.append(Outcome(job, status, told, "lepton:reply:me"))
                if job in self.ended:
                    duplicates.append(job)
                    self.counts["duplicate"] += 1
                    self.attempts.pop(job, None)
                elif status == "retried":
                    self.counts["retried"] += 1
                    self.retrying[job] = told or self.retrying.get(job, b"")
                else:
                    self.counts[status] += 1
                    self.attempts.pop(job, None)
                    self.ended.add(job)
                    if told:
                        self.results[job] = told
                        self.retrying.pop(job, None)
                        self.replies[job] += 1
                if status == "retried":
                    retries.append((job, NEVER, message))
                if status == "dead":
                    dead.append(DeadLetter(job, KERNEL, "retries", "because", 3, message))
                if status == "succeeded" and follow:
                    pushes.append((job, topology.LANE, self.message()))
            late = set(duplicates)
            self.at(topology.LANE).extend(each for job, _, each in pushes if job not in late)
            for job, _, message in retries:
                if job not in late:
                    self.counts["accepted"] += 1
                    self.hold_back(job, NEVER, message)
            self.letters += [(each.job, each.code, each.message) for each in dead if each.job not in late]
            self.marks -= {outcome.job for outcome in outcomes if outcome.status == "cancelled"}
            self.counts["bundled"] -= extra_of(held)
            step = Commit(
                slot, len(held), outcomes, b"event", pushes, retries, dead=dead, bundled=len(jobs) - len(held)
            )
            assert Counter(broker.commit(step)) == Counter(duplicates)
            if lost:  # the reply, so it is sent again
                with pytest.raises(Fenced):
                    broker.commit(step)

        @when(lambda self: self.having(self.batches))
        @possible(flags=st.text(".!=", min_size=4, max_size=4), data=None)
        def release(self, flags: str, data: st.DataObject) -> None:
            role, slot = data.draw(st.sampled_from(self.having(self.batches)))
            broker = self.holders[role].broker
            held = self.pull(topology.held(broker.incarnation, slot))
            flags = (flags * 100)[: len(held)]
            broker.release(slot, held, flags)
            targets = {".": topology.AGAIN, "!": topology.ALONE, "=": topology.held(broker.incarnation, slot)}
            for message, flag in zip(held, flags, strict=True):
                self.at(targets[flag]).append(message)

        # -- deaths -------------------------------------------------------------------------------------------

        @possible(role=st.sampled_from([*ROUTERS, *WORKERS]))
        def kill(self, role: str) -> None:
            holder = self.holders[role]
            assert self.connection.call("DEL", topology.lease(holder.broker.incarnation)) == 1
            holder.alive = False
            self.start(role)

        @when(lambda self: any(map(self.at, QUEUES)))
        @possible(role=st.sampled_from(WORKERS), limit=st.integers(1, 2), data=None)
        def die_at_work(self, role: str, limit: int, data: st.DataObject) -> None:
            """A death of a worker that has just taken something, and what comes back of that on its way to another."""
            self.take(role, limit, data)
            self.kill(role)
            self.recover("router0", twice=False)
            while any(map(self.at, BACK.values())):
                self.claim_back("router1", 0, 5, data)
            if any(map(self.at, self.claims(self.holders["router1"].broker.incarnation, 0))):
                self.dispatch_from("router1", ["cpu"])

        @when(lambda self: any(self.at(name) for name in (*topology.lane_lists(), *topology.lane_lists(TENANT))))
        @possible(limit=st.integers(1, 5))
        def die_with_claims(self, limit: int) -> None:
            """A death of a router that has just claimed something, which another gives back."""
            self.claim("router1", 0, limit)
            self.kill("router1")
            self.recover("router0", twice=False)

        def give_back(self, broker: Broker, held_goes: str) -> int:
            """What `drain` in functions.lua does; how many messages moved."""
            moved = 0
            for number in (0, 1):
                for kind, target in ((Kind.NEW, topology.AGAIN), *BACK.items()):
                    found = self.pull(topology.claim(broker.incarnation, number, kind))
                    for message in found if kind is Kind.NEW else ():
                        self.counts["accepted"] += len(jobs_of(message))
                        self.counts["bundled"] += extra_of([message])
                        self.extra[wire.lane_of(message)] -= extra_of([message])
                    self.at(target).extend(found)
                    moved += len(found)
                found = self.pull(topology.held(broker.incarnation, number))
                self.at(held_goes).extend(found)
                moved += len(found)
            return moved

        @possible(role=st.sampled_from([*ROUTERS, *WORKERS]))
        def resign(self, role: str) -> None:
            holder = self.holders[role]
            before = self.lengths()
            moved = self.give_back(holder.broker, topology.AGAIN)
            assert holder.broker.resign() == moved
            holder.alive = False
            self.adopt_order(before)
            self.start(role)

        @possible(role=st.sampled_from(["router0", "worker1"]), twice=st.booleans())
        def recover(self, role: str, twice: bool) -> None:
            self.lanes = {lane for lane in self.lanes if any(map(self.at, topology.lane_lists(lane)))}
            before = self.lengths()
            moved = died = 0
            for holder in self.holders.values():
                if holder.alive:
                    continue
                incarnation = holder.broker.incarnation
                held = [(number, self.at(topology.held(incarnation, number))) for number in (0, 1)]
                if sum(len(found) for _, found in held) == 1:
                    ((number, (message,)),) = [each for each in held if each[1]]
                    job = job_of(message)
                    if extra_of([message]) == 0:  # of a bundle none ran alone
                        self.attempts[job] += 1
                    if self.attempts[job] >= VALUES.attempts:
                        self.pull(topology.held(incarnation, number))
                        moved += 1
                        if self.finish(job, "dead", b""):
                            died += 1
                            self.letters.append((job, "poison", message))
                moved += self.give_back(holder.broker, topology.ALONE)
            found = self.holders[role].broker.recover()
            assert (found.messages, found.dead) == (moved, died)
            if twice:
                assert self.holders["router1"].broker.recover().messages == 0
            self.adopt_order(before)

        def lengths(self) -> dict[str, int]:
            return {target: len(self.at(target)) for target in BACK.values()}

        def adopt_order(self, before: dict[str, int]) -> None:
            """Each list comes back in its order, but holders and devices in any."""
            for target, length in before.items():
                found = self.connection.call("LRANGE", target, 0, -1)[::-1]
                assert Counter(found) == Counter(self.at(target))
                assert found[:length] == self.at(target)[:length]
                self.lists[target] = found

        @when(lambda self: any(not holder.alive for holder in self.holders.values()))
        @possible(data=None)
        def a_dead_one_wakes_and_goes_on(self, data: st.DataObject) -> None:
            dead = sorted(name for name, holder in self.holders.items() if not holder.alive)
            broker = self.holders[data.draw(st.sampled_from(dead))].broker
            held = broker.held(0)
            outcomes = [Outcome(job_of(each), "succeeded", record(job_of(each), "succeeded")) for each in held]
            with pytest.raises(Fenced):
                broker.commit(Commit(0, len(held), outcomes, b"event"))
            with pytest.raises(Fenced):
                broker.release(0, held, "." * len(held))
            assert not broker.renew()

        @possible(data=None)
        def cancel(self, data: st.DataObject) -> None:
            if not self.ids or self.full:
                return
            job = data.draw(st.sampled_from(self.ids))
            self.holders["router0"].broker.cancel([job])
            self.marks.add(job)

        # -- what must hold -----------------------------------------------------------------------------------

        @invariant()
        def every_message_is_where_the_model_has_it(self) -> None:
            found: dict[str, Any] = {
                key.decode(): self.connection.call("LRANGE", key, 0, -1)[::-1]
                for key in self.connection.call("KEYS", "lepton*")
                if not key.startswith(b"lepton:reply:") and self.connection.call("TYPE", key) == b"list"
            }
            expected = {key: messages for key, messages in self.lists.items() if messages}
            for lists in (found, expected):  # of two equal messages of a claim, either may be the one that stayed
                lists |= {key: sorted(lists[key]) for key in lists if key.split(":")[1:2] in CLAIMS}
            assert found == expected

        @invariant()
        def what_waits_for_its_time_is_there_once(self) -> None:
            found = self.connection.call("HGETALL", topology.ETA_MESSAGES)
            assert found == {job.encode(): message for job, (_, message) in self.scheduled.items()}
            assert set(self.connection.call("ZRANGE", topology.ETA, 0, -1)) == found.keys()

        @invariant()
        def every_job_ends_once(self) -> None:
            keys = self.connection.call("KEYS", "celery-task-meta-*")
            stored = {key.decode().removeprefix("celery-task-meta-"): self.connection.call("GET", key) for key in keys}
            final = {job: raw for job, raw in stored.items() if results.read(raw).status != "RETRY"}
            assert final.keys() == self.results.keys()
            assert all(final[job] == told for job, told in self.results.items() if told)
            assert stored.keys() - final.keys() == self.retrying.keys()
            replies = [results.read(raw).task_id for raw in self.connection.call("LRANGE", "lepton:reply:me", 0, -1)]
            assert Counter(replies) == self.replies

        @invariant()
        def what_is_known_of_jobs_is_forgotten_with_them(self) -> None:
            found = {job.decode(): int(n) for job, n in self.connection.call("HGETALL", topology.ATTEMPTS).items()}
            assert found == {job: n for job, n in self.attempts.items() if n}
            assert {job.decode() for job in self.connection.call("ZRANGE", topology.CANCELLED, 0, -1)} == self.marks

        @invariant()
        def what_is_counted_of_bundles_is_what_is_in_them(self) -> None:
            before: Counter[str] = Counter()
            behind = 0
            for key, messages in self.lists.items():
                if key.startswith(topology.LANE) or key.split(":")[1:2] == [Kind.NEW.value]:
                    for message in messages:
                        before[wire.lane_of(message)] += extra_of([message])
                else:
                    behind += extra_of(messages)
            assert +self.extra == +before
            assert self.counts["bundled"] == behind
            told = {name.decode(): int(n) for name, n in self.connection.call("HGETALL", topology.BUNDLED).items()}
            assert {lane: n for lane, n in told.items() if n} == +before

        @invariant()
        def dead_letters_are_kept(self) -> None:
            found = []
            for _, fields in self.connection.call("XRANGE", topology.DEAD, "-", "+"):
                kept = dict(zip(fields[::2], fields[1::2], strict=True))
                found.append((kept[b"job"].decode(), kept[b"code"].decode(), kept[b"message"]))
            assert Counter(found) == Counter(self.letters)

        @invariant()
        def all_is_counted_and_nothing_is_missing(self) -> None:
            reply = self.connection.call(*functions.call("sizes", (), (LISTS_EACH,)))
            sizes = {name.decode(): value for name, value in zip(reply[::2], reply[1::2], strict=True)}
            assert sizes["difference"] == 0
            expected = dict.fromkeys(TERMS, 0) | {name: self.counts[name] for name in (*ENDS, "bundled")}
            expected["lanes"] = self.extra.total()
            for key, messages in self.lists.items():
                expected[_term(key)] += len(messages)
            expected["scheduled_now"] = len(self.scheduled)
            expected["dead_letters"] = len(self.letters)
            new = expected["lanes"] + expected["claimed"]
            came_back = sum(expected[name] for name in ("again", "alone", "reclaimed", "parked_now", "scheduled_now"))
            expected["accepted"] = self.counts["accepted"] + new
            expected["waiting"] = new + came_back
            expected["in_flight"] = expected["queued"] + expected["held"] + expected["bundled"]
            assert {name: value for name, value in sizes.items() if name != "difference"} == expected

    return MessagePath


CLAIMS = [[kind.value] for kind in Kind]
ENDS = ("succeeded", "failed", "cancelled", "expired", "dead", "retried", "duplicate")
TERMS = ("lanes", "bundled", "claimed", "again", "alone", "reclaimed", "parked_now", "scheduled_now", "queued", "held")


def _term(key: str) -> str:
    """The term of `sizes` that a list belongs to."""
    found = {
        topology.AGAIN: "again",
        topology.ALONE: "alone",
        topology.parked(KERNEL): "parked_now",
        topology.parked_alone(KERNEL): "parked_now",
    }
    if key in found:
        return found[key]
    if key.startswith(topology.LANE):
        return "lanes"
    kinds = {"claim": "claimed", "reclaim": "reclaimed", "suspects": "reclaimed", "held": "held"}
    return kinds.get(key.split(":")[1], "queued") if ":" in key else "queued"


def test_in_any_order_of_steps_and_deaths_every_message_is_in_one_place(broker_url: str) -> None:
    run_state_machine_as_test(_machine(broker_url), settings=THOROUGH)


THOROUGH = settings(
    max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)
