"""The message path on the broker: lease, claim, dispatch, take, commit, release, recover, cancel.

Every step is one atomic move, so a message is always in exactly one place: a lane, a claim, a device queue, a held
list, `again`, `again.alone`, `parked` or `eta`. Messages do not pass through Lua while the broker has room; results do
(`functions.lua`). `Broker` speaks for one incarnation over one connection, and is used by one thread.

A broker whose memory is full refuses plain moves; server functions still work, so that what is there drains.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import suppress
from enum import StrEnum
from itertools import chain, islice
from typing import Any, Final, NamedTuple

import msgspec

from lepton_ai import blob, bundle, cancellation, topology, wire
from lepton_ai.device import Announcement, read_leases
from lepton_ai.errors import Fenced
from lepton_ai.identity import minute_of, shared_by
from lepton_ai.job import FINAL_STATES
from lepton_ai.settings import Settings
from lepton_ai.succession import FollowUps
from queues import functions, recovery
from queues.connection import Command, CommandError, Connection
from queues.recovery import LISTS_EACH, Recovered, Sequels
from queues.steps import Carry, Commit, Dispatch, Moves, Outcome

__all__ = [
    "CLAIM_LIMIT",
    "LISTS_EACH",
    "ROUTER",
    "WAKE",
    "Broker",
    "Kind",
    "Stale",
    "Woken",
    "announcements",
    "event_command",
    "routers",
]

CLAIM_LIMIT: Final = 256
#: The claim that a wake-up lands in; the others are numbered below it.
WAKE: Final = LISTS_EACH - 1
#: How the incarnations of routers begin.
ROUTER: Final = "router-"
_MOVED_AT_ONCE: Final = 64
_MARKED_AT_ONCE: Final = 1024
_LOOKED_AT_ONCE: Final = 256
_DUE_AT_ONCE: Final = 256
#: So many messages, of so many bytes together, are dispatched in one round trip, through Lua; more of them need two.
_FEW: Final = 8
_FEW_BYTES: Final = 16 * 1024
#: In a command of a step; even, and well below what Lua can hand on at once.
_MOST_WORDS: Final = 4000
#: The queues of so many devices are looked at with a wake-up: a lone job goes to one of them in one step.
_LOOKED_QUEUES: Final = 8
#: How long the Placement of a lone job waits for its worker to take it.
_PLACED_S: Final = 60
#: Where in a result its state is looked for.
_STATE: Final = re.compile(rb"status[^A-Z]*([A-Z]+)")
_STATE_WITHIN: Final = 200
#: Our field in a result. A revoked one without it is a Celery worker's, which ends nothing: see functions.lua.
_OURS: Final = re.compile(rb'^\{.*"lepton":|^[^{].*\xa6lepton[\x80-\x8f]', re.DOTALL)
#: How long a full broker is left alone before it is asked again.
_FULL_S: Final = 0.1


class _Noted(msgspec.Struct):
    """What is read of a Placement to know whose it is."""

    job: str


_NOTED: Final = msgspec.msgpack.Decoder(_Noted)


class Kind(StrEnum):
    """What a claim holds, which decides where it goes back to: what may not be counted or suspected again."""

    NEW = "claim"
    """From a lane."""
    AGAIN = "reclaim"
    ALONE = "suspects"


_BACK: Final = {Kind.ALONE: topology.ALONE, Kind.AGAIN: topology.AGAIN}


class Woken(NamedTuple):
    """What a wake-up brought."""

    message: bytes | None
    """In the wake claim; None where the wait was in vain, or a claim has taken it over meanwhile."""
    is_all: bool
    """Nothing else waits, and nobody has asked for anything to be cancelled."""


class Stale(Exception):
    """A state that jobs of a batch carry was carried on by others meanwhile, or one of them has ended: run it anew."""


class Broker:
    """The message path for one incarnation. Raises BrokerUnavailable when the connection breaks."""

    def __init__(self, connection: Connection, incarnation: str, settings: Settings) -> None:
        self.connection = connection
        self.incarnation = incarnation
        self._settings = settings
        self._ttl_s = max(1, round(settings.result_ttl_s))
        self._lease = topology.lease(incarnation)
        self._wake_claim = topology.claim(incarnation, WAKE)
        self._known_devices: set[str] = set()
        self._lanes: list[str] = [topology.LANE]
        self._full_at = -math.inf
        self._behind_s = 0.0
        """The server's clock less our monotonic one."""
        self.marks = 0
        """How many jobs were marked as cancelled at the last `claim`."""
        self.back: dict[Kind, int] = {}
        """How many messages of each kind waited beside the lanes at the last `claim`."""
        self.is_waking = False
        """A wake-up has been asked for, and not been taken."""
        self._is_taken_over = False
        """What that wake-up brought has left the wake claim with a `claim`, before its answer was read."""
        self._looked_at: dict[str, str] = {}
        """The queues that are looked at with the next wake-up, by their device."""
        self._woken: Connection | None = None
        """Watches the wake claim, which held the message of the last wake-up and nothing else."""
        self._lone_note: bytes | None = None
        """A Placement that came with the last message taken, perhaps its own; None where jobs are to be cancelled."""
        functions.load(connection)
        self._look_at_clock(*connection.call("TIME"))

    # -- leases -------------------------------------------------------------------------------------------------

    def announce(self, value: bytes) -> None:
        """Takes the lease, with what others should know of this incarnation in it."""
        self._call("announce", (self._lease,), (value, self._lease_ms, self.incarnation))

    def renew(self) -> bool:
        """Prolongs the lease; False where it has lapsed, and what was held may be somebody else's by now."""
        renewed, clock = self.connection.many([("PEXPIRE", self._lease, self._lease_ms), ("TIME",)])
        self._look_at_clock(*clock)
        return bool(renewed)

    def resign(self) -> int:
        """Gives the lease back, and whatever is still held: nobody is suspected. Returns how many messages that was."""
        self.connection.call("DEL", self._lease)
        return recovery.give_back(self.connection, self.incarnation)

    def resign_as_dead(self) -> None:
        """Gives the lease up with whatever is still held: the next sweep takes that for a death's, as it is."""
        self.connection.call("DEL", self._lease)

    def recover(self, sequels: Sequels = lambda *_: FollowUps()) -> Recovered:
        """Gives back what lapsed holders still hold; `sequels` says what a job sets off that dies for good."""
        return recovery.recover(self.connection, self.incarnation, self._settings, sequels)

    def now(self) -> float:
        """Seconds since the epoch by the server's clock, as of the last `renew`; nobody's own clock decides here."""
        return time.monotonic() + self._behind_s

    def _look_at_clock(self, seconds: bytes, microseconds: bytes) -> None:
        self._behind_s = int(seconds) + int(microseconds) / 1e6 - time.monotonic()

    @property
    def _lease_ms(self) -> int:
        return round(self._settings.lease_s * 1000)

    @property
    def _remember(self) -> Command:
        """Goes before every move into a list of ours: whoever has been frozen and forgotten is looked after again."""
        return ("SADD", topology.HOLDERS, self.incarnation)

    # -- a broker without memory --------------------------------------------------------------------------------

    @property
    def is_full(self) -> bool:
        """Whether the broker refused something for want of memory a moment ago: then it is asked, not waited for."""
        return time.monotonic() - self._full_at < _FULL_S

    def _refused(self, replies: Iterable[Any]) -> bool:
        """Whether one of these replies is a refusal for want of memory; every other error is raised."""
        full = False
        for reply in replies:
            if functions.is_full(reply):
                full = True
            elif isinstance(reply, CommandError):
                raise reply
        if full:
            self._full_at = time.monotonic()
        return full

    # -- the router's side --------------------------------------------------------------------------------------

    def ask_wake(self, wake: Connection) -> None:
        """Waits, on a connection of its own, for the next message of the default lane; it lands in the wake claim.

        The wake-up is itself a durable claim, and the next `claim` takes it over, whether or not the connection has
        answered yet. The wait ends before our lease can lapse, or a frozen router that has been forgotten would still
        be given messages. `woke` takes the answer.
        """
        wake.send(self._wake_commands())
        self.is_waking = True

    def _wake_commands(self) -> list[Command]:
        wait_s = self._settings.lease_s / 2
        self._is_taken_over = False
        looked_at = islice(self._known_devices, _LOOKED_QUEUES)
        self._looked_at = {device: topology.device_queue(device) for device in looked_at}
        return [
            ("CLIENT", "REPLY", "SKIP"),  # the next moment at which there is something to read is the wake-up
            self._remember,
            ("BLMOVE", topology.LANE, self._wake_claim, "RIGHT", "LEFT", wait_s),
            ("UNWATCH",),
            ("WATCH", self._wake_claim),  # so that the message can leave it in one step: see `_dispatch_woken`
            ("LLEN", self._wake_claim),
            ("EXISTS", topology.CANCELLED, *_BACK.values(), *self._lane_lists()),
            ("SMEMBERS", topology.LANES),
            *(("LLEN", queue) for queue in self._looked_at.values()),
        ]

    def woke(self, wake: Connection) -> Woken:
        """The answer to `ask_wake`: what has landed in the wake claim, and whether that is all that there is to do."""
        answer, _, _, length, others, tenants, *depths = wake.receive(6 + len(self._looked_at))
        self.is_waking = False
        if self._refused([answer]) or answer is None or self._is_taken_over:
            return Woken(None, is_all=False)
        # Whatever else is not as it should be, the next `claim` deals with.
        lanes = set() if isinstance(tenants, CommandError) else {topology.LANE, *_names(tenants)}
        is_all = length == 1 and others == 0 and lanes == set(self._lanes)
        are_queues = not any(isinstance(each, CommandError) for each in depths)
        self._woken = wake if is_all and are_queues else None
        return Woken(answer, is_all)

    def _lane_lists(self) -> list[str]:
        """Every list of every lane, the most urgent first."""
        return [lane + suffix for suffix in topology.PRIORITY_SUFFIXES for lane in self._lanes]

    @staticmethod
    def _looks(lists: Iterable[str]) -> list[Command]:
        """What a claim must know: the cancel marks, the tenants, and how long lists are."""
        return [
            ("ZCARD", topology.CANCELLED),
            ("SMEMBERS", topology.LANES),
            *(("LLEN", each) for each in lists),
        ]

    def claim(self, kind: Kind, number: int, have: int, limit: int) -> list[bytes]:
        """Moves up to `limit` waiting messages of a kind to a claim of that kind, which already holds `have`.

        New ones come from the lanes, the most urgent first and each lane's in turn, and leave room for what waits
        beside them (`back`). Raises Fenced where the claim does not hold what it should.
        """
        claim = topology.claim(self.incarnation, number, kind)
        messages, length = (
            self._claim_new(claim, limit) if kind is Kind.NEW else self._claim_back(claim, _BACK[kind], limit)
        )
        if length != have + len(messages):
            raise Fenced(f"{claim} holds {length} messages, not the {have + len(messages)} in hand")
        return messages

    def _claim_new(self, claim: str, limit: int) -> tuple[list[bytes], int]:
        lanes = self._lanes
        lists = self._lane_lists()
        # What the wake-up brought is older than all that the default list still holds, so it comes first.
        first = [self._remember, ("LMOVE", self._wake_claim, claim, "RIGHT", "LEFT")]
        sent = self.connection.send([*first, *self._looks((claim, *_BACK.values(), *lists))])
        remembered, brought, marked, tenants, length, *depths = self.connection.receive(sent)
        # Nobody's job waits for what is not as it should be.
        self.marks = 0 if isinstance(marked, CommandError) else marked
        is_full = self._refused([remembered, brought, length, *depths])
        self._is_taken_over |= brought is not None
        self.back = dict(zip(_BACK, depths, strict=False))
        room = max(0, limit - sum(self.back.values()))
        messages: list[bytes] = [brought] if isinstance(brought, bytes) else []
        if self._have_changed([] if isinstance(tenants, CommandError) else _names(tenants)):
            # Nothing but the push that woke us told of a new lane's first job.
            moved, length = self._claim_new(claim, limit - len(messages))
            return messages + moved, length
        if is_full:
            moved, length = self._move([], claim, [self._wake_claim, *lists], max(1, room) - len(messages))
            return messages + moved, length
        moves: list[Command] = []
        given = dict.fromkeys(lanes, 0)
        for at in range(0, len(lists), len(lanes)):  # one priority of every lane
            left = max(0, room - len(messages) - len(moves))
            waiting = depths[len(_BACK) :][at : at + len(lanes)]
            for lane, source, share in zip(lanes, lists[at : at + len(lanes)], _shares(waiting, left), strict=True):
                moves += [("LMOVE", source, claim, "RIGHT", "LEFT")] * share
                given[lane] += share
        # Whoever has given least comes first next time, when there may be room for one only.
        self._lanes.sort(key=lambda lane: given.get(lane, 0))
        if not moves:
            return messages, length
        moved, length = self._move(moves, claim, lists, room - len(messages))
        return messages + moved, length

    def _claim_back(self, claim: str, source: str, limit: int) -> tuple[list[bytes], int]:
        return self._move([("LMOVE", source, claim, "RIGHT", "LEFT")] * limit, claim, [source], limit)

    def _move(
        self, moves: Sequence[Command], target: str, sources: Sequence[str], limit: int
    ) -> tuple[list[bytes], int]:
        """What these moves bring, and the length of the target then; by a function where the broker is full."""
        _, *replies = self.connection.receive(self.connection.send([self._remember, *moves, ("LLEN", target)]))
        found = [each for each in replies[:-1] if each is not None and not isinstance(each, CommandError)]
        length = replies[-1]
        if self._refused(replies) or (self.is_full and not moves):
            # As LMOVE, many times, by a function, which a full broker still allows.
            found += self._call("move", (target, *sources), (limit - len(found), self.incarnation))
            length = self.connection.call("LLEN", target)
        return found, length

    def _have_changed(self, tenants: Sequence[str]) -> bool:
        """Whether there are other lanes than those we knew; then we know them now."""
        lanes = {topology.LANE, *tenants}
        if lanes == set(self._lanes):
            return False
        self._lanes = sorted(lanes)
        return True

    def unpark(self, kernel: str) -> int:
        """Moves the parked jobs of a kernel to `again`; returns how many."""
        moved = 0
        while more := self._call("unpark", (), (kernel, _MOVED_AT_ONCE)):
            moved += more
        return moved

    def unpark_jobs(self, kernel: str, jobs: Container[str]) -> int:
        """Moves these of the parked jobs of a kernel to `again`; returns how many that were."""
        found: list[bytes] = []
        for source in (topology.parked(kernel), topology.parked_alone(kernel)):
            at = 0  # from the end, which what is parked meanwhile does not move
            while messages := self.connection.call("LRANGE", source, -at - _LOOKED_AT_ONCE, -at - 1):
                at += len(messages)
                names = [(message, wire.read_names(message)) for message in messages]
                found += [message for message, headers in names if headers is not None and headers.id in jobs]
        return sum(
            self._call("unpark", (), (kernel, 0, *found[start : start + _MOVED_AT_ONCE]))
            for start in range(0, len(found), _MOVED_AT_ONCE)
        )

    def overdue(self) -> list[str]:
        """Kernels among whose parked jobs one has passed its deadline."""
        return _names(self.connection.call("ZRANGEBYSCORE", topology.DEADLINES, "-inf", f"{self.now():.3f}"))

    def due(self, jobs: Sequence[str] = ()) -> tuple[int, float]:
        """Moves jobs whose time has come to `again`, or these at once where they wait for theirs.

        Returns how many moved, and the seconds until the next is due (infinite where none waits).
        """
        moved, next_ms = self._call("due", (), (_DUE_AT_ONCE, *jobs))
        return moved, math.inf if next_ms < 0 else next_ms / 1000

    def _move_all(self, source: str, target: str) -> int:
        """Moves what a list holds now, in its order, a few hundred at a time; returns how many messages that were."""
        moved, depth = 0, self.connection.call("LLEN", source)
        while moved < depth:
            count = min(_MOVED_AT_ONCE, depth - moved)
            replies = self.connection.receive(
                self.connection.send([("LMOVE", source, target, "RIGHT", "LEFT")] * count)
            )
            found = sum(isinstance(each, bytes) for each in replies)
            if self._refused(replies):
                found += len(self._call("move", (target, source), (count - found, self.incarnation)))
            moved += found
            if found < count:
                break
        return moved

    def parked_kernels(self) -> set[str]:
        return set(_names(self.connection.call("SMEMBERS", topology.PARKED)))

    def take_back(self, live: Iterable[str]) -> int:
        """Moves what waits in the queues of devices that nobody serves any more to `again`; returns how many.

        A device counts as known once a router has dispatched to it.
        """
        known = set(_names(self.connection.call("SMEMBERS", topology.DEVICES)))
        return sum(
            self._move_all(topology.device_queue(device), topology.AGAIN)
            + self._move_all(topology.alone_queue(device), topology.ALONE)
            for device in known.difference(live)
        )

    def depths(self, devices: Sequence[str]) -> list[int]:
        """How many messages each device's queues hold now."""
        lengths = self.connection.many(
            [("LLEN", queue) for each in devices for queue in (topology.device_queue(each), topology.alone_queue(each))]
        )
        return [own + alone for own, alone in zip(lengths[::2], lengths[1::2], strict=True)]

    def dispatch(self, step: Dispatch) -> None:
        """Takes messages out of their claims and puts each where it goes, all or nothing.

        Raises Fenced where a claim is no longer exactly what this router put into it (another has adopted it), and
        CommandError where a key it needs holds something else: a transaction that fails half way is not rolled back.
        """
        claims, lengths = list(step.claims), list(step.claims.values())
        wake, self._woken = self._woken, None
        if wake is not None and claims == [self._wake_claim] and (lone := step.lone) is not None:
            queue = self._looked_at.get(lone[0])
            if queue is not None and self._dispatch_woken(wake, step, queue):
                return
        moves = step.moves()
        if step.is_few(moves, _FEW, _FEW_BYTES):
            queues = list(step.queues)
            if self._transact([*claims, *queues], [*lengths, *[""] * len(queues)], step, moves) < 0:
                raise Fenced(f"claims {claims} do not hold {lengths}")
            self._known_devices |= step.queued.keys() | step.alone.keys()
            return
        needed = [("LLEN", key) for key in step.queues]
        if step.scheduled:
            needed += [("ZCARD", topology.ETA), ("HLEN", topology.ETA_MESSAGES)]
        if step.dead:
            needed += [("XLEN", topology.DEAD)]
        sent = self.connection.send([("WATCH", *claims), *(("LLEN", claim) for claim in claims), *needed])
        _, *found = self.connection.receive(sent)
        if found[: len(claims)] != lengths:
            self.connection.call("UNWATCH")
            raise Fenced(f"claims {claims} hold {found[: len(claims)]}, not {lengths}")
        for each in found:
            if isinstance(each, CommandError):
                self.connection.call("UNWATCH")
                raise each
        commands = list(self._dispatch_commands(step, moves))
        *queued, answer = self.connection.receive(self.connection.send([("MULTI",), *commands, ("EXEC",)]))
        if self._refused([*queued, None if _is_aborted(answer) else answer]) or _is_aborted(answer):
            is_done = self._transact(claims, lengths, step, moves) >= 0
        else:
            is_done = answer is not None
        if not is_done:
            raise Fenced(f"claims {claims} changed under our hands")
        self._known_devices |= step.queued.keys() | step.alone.keys()

    def _dispatch_woken(self, wake: Connection, step: Dispatch, queue: str) -> bool:
        """Sends the message of the last wake-up to its device and waits for the next one, in one write.

        The claim has been watched since before it was seen to hold one message. False where the broker is full.
        """
        move = ("LMOVE", self._wake_claim, queue, "RIGHT", "LEFT")
        commands = [("MULTI",), move, *self._note_commands(step), ("EXEC",)]
        wake.send([*commands, *self._wake_commands()])
        self.is_waking = True
        *queued, answer = wake.receive(len(commands))
        if self._refused([*queued, None if _is_aborted(answer) else answer]) or _is_aborted(answer):
            return False
        if answer is None:
            raise Fenced(f"{self._wake_claim} changed under our hands")
        self._refused(answer)
        return True

    def _transact(self, lists: Sequence[str], lengths: Sequence[int | str], step: Dispatch, moves: Moves | None) -> int:
        words = [part for command in self._dispatch_commands(step, moves) for part in (len(command), *command)]
        return int(self._call("transact", lists, (*lengths, *words)))

    def _dispatch_commands(self, step: Dispatch, moves: Moves | None) -> Iterable[Command]:
        if unknown := (step.queued.keys() | step.alone.keys()) - self._known_devices:
            yield ("SADD", topology.DEVICES, *unknown)
        if moves is not None:
            yield from (("LMOVE", claim, queue, "RIGHT", "LEFT") for claim, queue in moves)
        else:
            yield from self._sort_out(step)
        yield from self._note_commands(step)

    @staticmethod
    def _sort_out(step: Dispatch) -> Iterable[Command]:
        """Writes messages anew that do not leave their claims in the order in which they go to their lists."""
        for claim in step.claims:
            rest, leaving = step.rests.get(claim, []), step.leaving.get(claim, [])
            if leaving and sum(map(len, leaving)) < sum(map(len, rest)):
                yield from (("LREM", claim, -1, message) for message in leaving)
                continue
            yield ("DEL", claim)
            yield from (("LPUSH", claim, *part) for part in _parts(rest))
        for queue, messages in step.queues.items():
            yield from (("LPUSH", queue, *part) for part in _parts(messages))

    def _note_commands(self, step: Dispatch) -> Iterable[Command]:
        """All that goes with the messages of a step."""
        if kernels := step.parked.keys() | step.parked_alone.keys():
            yield ("SADD", topology.PARKED, *kernels)
        for kernel, deadline in step.deadlines.items():
            yield ("ZADD", topology.DEADLINES, "LT", f"{deadline:.3f}", kernel)
        for job, due_at, message in step.scheduled:
            yield functions.call("schedule", (), (job, round(due_at * 1000), message))
        for letter in step.dead:
            yield functions.call("bury", (), (self._settings.dead_bytes, *letter.words))
        for outcome in step.rejected:
            sets_off = step.sequels.get(outcome.job, FollowUps())
            words = (outcome.job, outcome.status, outcome.record, outcome.reply_to, self._settings.dead_bytes)
            followed = [part for push in sets_off.pushes for part in push]
            yield functions.call("finish", (), (self._ttl_s, *words, sets_off.chord_part or b"", *followed))
            if outcome.job in step.blobs:
                yield from blob.drop_commands(step.blobs[outcome.job])
        for minute, placements in step.placements.items():
            pairs = [part for pair in placements.items() for part in pair]
            yield from (("HSET", topology.jobs(minute), *part) for part in _parts(pairs))
            yield ("EXPIRE", topology.jobs(minute), self._ttl_s)
        if (lone := step.lone) is not None:  # its worker finds it with the message, and need not ask
            yield ("SET", topology.placed(lone[0]), lone[1], "EX", _PLACED_S)
        for counter, count in step.counts.items():
            if count:
                yield ("HINCRBY", topology.COUNTERS, counter, count)
        for lane, count in step.bundled.items():
            yield ("HINCRBY", topology.BUNDLED, lane, -count)
        if cancelled := [outcome.job for outcome in step.rejected if outcome.status == "cancelled"]:
            yield from (("ZREM", topology.CANCELLED, *part) for part in _parts(cancelled))
        if step.event:
            yield event_command(step.event, self._settings.events_kept)
        if step.told is not None:
            yield step.told

    # -- the worker's side --------------------------------------------------------------------------------------

    def take(
        self, device: str, slot: int, limit: int, slots: int, timeout_s: float, *, alone: bool = False
    ) -> list[bytes]:
        """Takes up to `limit` messages, oldest first, leaving the other slots their share; [] after `timeout_s`.

        `alone` takes from the device's suspects. What a lost reply left in the held list is handed out again first.
        """
        queue = topology.alone_queue(device) if alone else topology.device_queue(device)
        held = topology.held(self.incarnation, slot)
        take = ("BLMOVE", queue, held, "RIGHT", "LEFT", timeout_s)
        # What `known` would ask for next, where it is one job that comes.
        asked = (("TIME",), ("ZCARD", topology.CANCELLED), ("GET", topology.placed(device)))
        sent = self.connection.send([self._remember, take, ("LLEN", queue), ("LLEN", held), *asked])
        *replies, clock, marks, note = self.connection.receive(sent, timeout_s + 30)
        self._lone_note = None
        if self._refused(replies):
            return self._take_from_full(queue, held, slot, limit, timeout_s)
        _, first, depth, length = replies
        if first is None and length == 0:
            return []
        self._look_at_clock(*clock)
        if marks == 0 and isinstance(note, bytes):
            self._lone_note = note
        if length > 1 or first is None:
            return self.held(slot)
        more = min(limit - 1, -(-depth // slots))
        if more <= 0:
            return [first]
        moves = [("LMOVE", queue, held, "RIGHT", "LEFT")] * more
        _, *replies = self.connection.receive(self.connection.send([self._remember, *moves, ("LLEN", held)]))
        messages = [first, *(message for message in replies[:-1] if message is not None)]
        return self.held(slot) if self._refused(replies) or replies[-1] != len(messages) else messages

    def _take_from_full(self, queue: str, held: str, slot: int, limit: int, timeout_s: float) -> list[bytes]:
        if messages := self.held(slot):
            return messages
        messages, _ = self._move([], held, [queue], limit)
        if not messages:
            time.sleep(min(timeout_s, _FULL_S))  # it refuses to tell us when something comes
        return messages

    def held(self, slot: int) -> list[bytes]:
        """What a slot holds, oldest first."""
        found: list[bytes] = self.connection.call("LRANGE", topology.held(self.incarnation, slot), 0, -1)
        return found[::-1]

    def known(
        self, jobs: Sequence[str], minutes: Iterable[int], bundles: Sequence[Sequence[str]] = ()
    ) -> tuple[dict[str, bytes], set[str]]:
        """The placements of these jobs, and which are to be cancelled.

        A job is looked for in the hash of its own minute, and in those of `minutes` where it is not found there. The
        jobs of each of `bundles` have one note together, whose placement names the first of them. A lone message's may
        have come with it, and then nobody is asked.
        """
        note, self._lone_note = self._lone_note, None
        if note is not None and len(jobs) + len(bundles) == 1:
            lone = bundles[0] if bundles else jobs
            its_note = bundle.note_of(lone[-1], note) if bundles else note
            if its_note is not None and _job_of(its_note) == lone[0]:
                return dict.fromkeys(lone, its_note), set()
        by_minute: dict[int, list[str]] = {}
        for job in jobs:
            if (minute := minute_of(job)) is not None:
                by_minute.setdefault(minute, []).append(job)
        fields = [(topology.jobs(minute), each) for minute, each in by_minute.items()]
        fields += [(topology.jobs(minute_of(each[0]) or 0), [shared_by(each[0]) or ""]) for each in bundles]
        sent = self.connection.send(
            [("TIME",), ("ZCARD", topology.CANCELLED), *(("HMGET", key, *each) for key, each in fields)]
        )
        clock, marks, *answers = self.connection.receive(sent)
        self._look_at_clock(*clock)
        placements: dict[str, bytes] = {}
        own, shared = _checked(answers)[: len(by_minute)], answers[len(by_minute) :]
        for each, values in zip(by_minute.values(), own, strict=True):
            placements.update(_found(each, values))
        for ids, (its_note,) in zip(bundles, shared, strict=True):
            if its_note is not None and (its_note := bundle.note_of(ids[-1], its_note)) is not None:
                placements.update(dict.fromkeys(ids, its_note))
        jobs = [*jobs, *chain.from_iterable(bundles)]
        if missing := [job for job in jobs if job not in placements]:
            for values in self.connection.many([("HMGET", topology.jobs(minute), *missing) for minute in minutes]):
                placements.update(_found(missing, values))
        # Nobody's job waits for marks that are not as they should be.
        return placements, self.marked(jobs) if marks and not isinstance(marks, CommandError) else set()

    def ended(self, jobs: Sequence[str]) -> set[str]:
        """Which of these jobs have a final result. Reads no more of it than its state, but for revoked ones."""
        asked = [("GETRANGE", topology.result(job), 0, _STATE_WITHIN) for job in jobs]
        starts = self.connection.receive(self.connection.send(asked)) if asked else []
        # What is no result at all, a key of another type, is none that stands.
        states = {job: _state(start) for job, start in zip(jobs, starts, strict=True) if isinstance(start, bytes)}
        revoked = [job for job, state in states.items() if state == "REVOKED"]
        wholes = self.connection.many([("GET", topology.result(job)) for job in revoked]) if revoked else []
        foreign = {job for job, whole in zip(revoked, wholes, strict=True) if not _OURS.search(whole or b"")}
        return {job for job, state in states.items() if state in FINAL_STATES} - foreign

    def commit(self, step: Commit) -> list[str]:
        """Ends a batch: results, acknowledgement, counters and event in one step; returns the duplicates' ids.

        Raises, with nothing written, Fenced where the lease has lapsed or the batch has been given to another, and
        Stale where a state that its jobs carry is another by now, or one of them has ended: then it is to be run anew.
        """
        held = topology.held(self.incarnation, step.slot)
        settings = self._settings
        cancelled = [outcome.job for outcome in step.outcomes if outcome.status == "cancelled"]
        arguments = (
            *(step.held, self._ttl_s, settings.events_kept, settings.dead_bytes, step.event, step.bundled),
            *_section(self._carry_rows(step.carried)),
            *_grouped(step.outcomes),
            *_section(step.pushes),
            *_section((job, round(delay_s * 1000), message) for job, delay_s, message in step.retries),
            *_section(step.chord_parts),
            *_section(letter.words for letter in step.dead),
            *_section(step.blobs),
            *_section((minute,) for minute in step.minutes),
        )
        try:
            duplicates = self._fenced("commit", held, arguments)
        except CommandError as error:
            # Of another type: it has become so since it was read, and what is run anew finds that out.
            if error.message.startswith(("STALE", f"WRONGTYPE {topology.carried('', '', '')[:-2]}")):
                raise Stale(error.message) from None
            raise
        if cancelled:  # afterwards, and not with it: a mark that stays behind does no harm
            with suppress(CommandError):
                self.connection.call("ZREM", topology.CANCELLED, *cancelled)
        return [name.decode() for name in duplicates]

    def _carry_rows(self, carried: Iterable[Carry]) -> Iterator[tuple[str | bytes | int, ...]]:
        ttl_s = max(1, round(self._settings.state_ttl_s))
        for each in carried:
            for job in each.jobs:
                value = each.value if job == each.jobs[-1] else b""
                yield job, each.key, each.version, each.new_version, ttl_s, value

    def carried(self, keys: Sequence[str], jobs: Sequence[str]) -> tuple[list[tuple[str, bytes | None]], set[str]]:
        """The version and the value of each of these states, and which of these jobs have ended already."""
        asked: list[Command] = [("HMGET", key, "version", "value") for key in keys]
        asked += [("EXISTS", topology.ended(job)) for job in jobs]
        found = self.connection.receive(self.connection.send(asked))
        # A key of another type: nobody can go on with that, or overwrite it.
        unreadable = (b"unreadable", b"")
        ended = {job for job, ignored in zip(jobs, found[len(keys) :], strict=True) if ignored}
        rows = (unreadable if isinstance(each, CommandError) else each for each in found[: len(keys)])
        states = [((version or b"").decode(errors="replace"), value) for version, value in rows]
        return states, ended | self.ended(jobs)

    def count_fenced(self) -> None:
        """A commit of ours was refused."""
        self._call("transact", (), (4, "HINCRBY", topology.COUNTERS, "fenced", 1))  # a full broker does that too

    def release(self, slot: int, messages: Sequence[bytes], flags: str) -> None:
        """Gives a batch back unrun; Fenced where it is no longer ours.

        `flags` has a letter for each message, oldest first: `.` for `again`, `!` for a suspect, `=` for one that stays.
        """
        self._fenced("release", topology.held(self.incarnation, slot), (len(messages), flags, *messages[:1]))

    def _fenced(self, function: str, held: str, arguments: Iterable[str | bytes | int | float]) -> Any:
        try:
            return self._call(function, (held, self._lease), arguments)
        except CommandError as error:
            if error.message.startswith("FENCED"):
                raise Fenced(f"{held}: {error.message}") from error
            raise

    # -- cancel -------------------------------------------------------------------------------------------------

    def cancel(self, jobs: Sequence[str]) -> None:
        """Marks jobs as cancelled and wakes the routers, unless somebody has done so already."""
        jobs = list(dict.fromkeys(jobs))
        for at in range(0, len(jobs), _MARKED_AT_ONCE):
            part = jobs[at : at + _MARKED_AT_ONCE]
            known = self.marked(part)
            if fresh := [job for job in part if job not in known]:
                self.connection.many(cancellation.mark(fresh, self.incarnation, events_kept=self._settings.events_kept))

    def marked(self, jobs: Sequence[str]) -> set[str]:
        """Which of these jobs are marked as cancelled."""
        if not jobs:
            return set()
        (scores,) = self.connection.receive(self.connection.send([("ZMSCORE", topology.CANCELLED, *jobs)]))
        return _scored(jobs, scores)

    # -- events -------------------------------------------------------------------------------------------------

    def emit(self, event: bytes) -> None:
        """Adds one entry to the event stream; one that is full does without."""
        self._refused(self.connection.receive(self.connection.send([event_command(event, self._settings.events_kept)])))

    def _call(self, function: str, keys: Sequence[str], arguments: Iterable[str | bytes | int | float] = ()) -> Any:
        return self.connection.call(*functions.call(function, keys, arguments))


def event_command(event: bytes, kept: int) -> Command:
    """Adds one entry to the event stream, which forgets its oldest beyond `kept`."""
    return ("XADD", topology.EVENTS, "MAXLEN", "~", kept, "*", "e", event)


def announcements(connection: Connection) -> list[Announcement]:
    """Every worker that is alive now."""
    holders = _names(connection.call("SMEMBERS", topology.HOLDERS))
    return read_leases(connection.call("MGET", *map(topology.lease, holders)) if holders else [])


def routers(connection: Connection) -> set[str]:
    """The incarnations of every router that is alive now."""
    holders = [name for name in _names(connection.call("SMEMBERS", topology.HOLDERS)) if name.startswith(ROUTER)]
    leases = connection.call("MGET", *map(topology.lease, holders)) if holders else []
    return {name for name, lease in zip(holders, leases, strict=True) if lease is not None}


def _parts(words: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Words of a command in as many as `transact` can hand on at once; pairs stay together."""
    return (words[at : at + _MOST_WORDS] for at in range(0, len(words), _MOST_WORDS))


def _grouped(outcomes: Iterable[Outcome]) -> list[str | bytes | int]:
    """Outcomes for `commit`: how many groups, and of each its status, reply list, size, and jobs with their records."""
    groups: dict[tuple[str, str], list[str | bytes]] = {}
    for each in outcomes:
        groups.setdefault((each.status, each.reply_to), []).extend((each.job, each.record))
    found: list[str | bytes | int] = [len(groups)]
    for group, words in groups.items():
        found += (*group, len(words) // 2, *words)
    return found


def _section(rows: Iterable[Sequence[str | bytes | int | float]]) -> list[str | bytes | int | float]:
    """Rows for a function: how many, and then their words."""
    found = list(rows)
    return [len(found), *chain.from_iterable(found)]


def _shares(depths: Sequence[int], room: int) -> list[int]:
    """How many each lane may give: as many as it has, and no more than its share of what there is room for.

    What cannot be shared equally goes to the first.
    """
    shares = [0] * len(depths)
    while room > 0 and (having := [lane for lane, depth in enumerate(depths) if depth > shares[lane]]):
        each = max(1, room // len(having))
        for lane in having:
            given = min(each, depths[lane] - shares[lane], room)
            shares[lane] += given
            room -= given
    return shares


def _is_aborted(reply: Any) -> bool:
    """Whether this is the answer of a transaction that did nothing: for want of memory, as every other error is raised.

    Memory may run out before one of its commands or, when all of those have been taken, before the transaction itself.
    """
    return isinstance(reply, CommandError) and reply.message.startswith("EXECABORT")


def _names(found: Iterable[bytes]) -> list[str]:
    return [name.decode(errors="replace") for name in found]  # anybody with the broker's password may write there


def _job_of(note: bytes) -> str:
    """Whose Placement that is; nobody's where it is none."""
    try:
        return _NOTED.decode(note).job
    except msgspec.DecodeError:  # anybody with the broker's password may write there
        return ""


def _found(jobs: Sequence[str], values: Sequence[bytes | None]) -> dict[str, bytes]:
    return {job: value for job, value in zip(jobs, values, strict=True) if value is not None}


def _scored(jobs: Sequence[str], scores: Any) -> set[str]:
    """Whose score is there; none where the key is not what it should be: a job must not wait for that."""
    if isinstance(scores, CommandError):
        return set()
    return {job for job, score in zip(jobs, scores, strict=True) if score is not None}


def _state(start: bytes) -> str:
    """As `is_final` in functions.lua: the state stands first in a result, in capitals."""
    found = _STATE.search(start)
    return "" if found is None else found[1].decode()


def _checked(replies: list[Any]) -> list[Any]:
    for reply in replies:
        if isinstance(reply, CommandError):
            raise reply
    return replies
