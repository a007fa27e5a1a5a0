"""The message path on the broker: lease, claim, dispatch, take, commit, release, recover, cancel.

Every step is one atomic move, so a message is always in exactly one list: a lane, a claim, a device queue, a held
list, `again` or `parked`. Messages never pass through Lua; results do (`functions.lua`). `Broker` speaks for one
incarnation over one connection, and is used by one thread.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from importlib import resources
from typing import Any, Final

import msgspec

from lepton_ai import cancellation, topology
from lepton_ai.device import Announcement, read_leases
from lepton_ai.errors import BrokerUnavailable, Fenced
from lepton_ai.job import FINAL_STATES
from lepton_ai.settings import Settings
from queues.connection import Command, CommandError, Connection

__all__ = ["Broker", "Commit", "Dispatch", "Outcome", "announcements", "event_command"]

CLAIM_LIMIT: Final = 256
#: Claims that one router may have open, and slots that one worker may have.
LISTS_EACH: Final = 64
#: The claim that a wake-up lands in; the others are numbered below it.
WAKE: Final = LISTS_EACH - 1
#: What a broker answers that will be able to work again, or that somebody must mend: no reason for a traceback.
_NOT_NOW: Final = ("MISCONF", "READONLY", "OOM", "LOADING", "MASTERDOWN", "NOREPLICAS", "BUSY")
_MOVED_AT_ONCE: Final = 64
_MARKED_AT_ONCE: Final = 1024
#: Where in a result its state is looked for.
_STATE: Final = re.compile(rb"status[^A-Z]*([A-Z]+)")
_STATE_WITHIN: Final = 200
_DEAD_KEPT: Final = 10_000
#: Where a router claims from, most urgent first.
_SOURCES: Final = (topology.AGAIN, *topology.lane_lists())


class Outcome(msgspec.Struct, frozen=True):
    """How one job of a batch ended. An empty `record` is an ignored result; without `reply_to` it is published."""

    job: str
    status: str
    """succeeded, failed or cancelled."""
    record: bytes
    reply_to: str = ""


class Commit(msgspec.Struct, frozen=True):
    """Everything that ends a batch: its outcomes and the event that tells of them."""

    slot: int
    held: int
    """Messages in the held list: the fence."""
    outcomes: Sequence[Outcome]
    event: bytes


class Dispatch(msgspec.Struct):
    """Everything that leaves a router in one step. Messages are in the order in which they should run."""

    claims: dict[str, int]
    """Each claim that messages leave, and how many it must hold now: the fence."""
    rests: dict[str, list[bytes]]
    """What stays in each of those claims."""
    leaving: dict[str, list[bytes]] = {}
    """What leaves each of them, where that is known: the smaller of the two is what has to be written again."""
    queued: dict[str, list[bytes]] = {}
    parked: dict[str, list[bytes]] = {}
    dead: list[tuple[str, bytes]] = []
    """Messages that nobody can read, each with the reason."""
    rejected: list[Outcome] = []
    placements: dict[int, dict[str, bytes]] = {}
    """Placements by the minute whose hash they go into."""
    counts: dict[str, int] = {}
    event: bytes = b""
    told: Command | None = None
    """A message for Celery's event listeners (queues/celery_events.py)."""


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
        self.marks = 0
        """How many jobs were marked as cancelled at the last `claim`."""
        self._version = load_functions(connection)

    # -- leases -------------------------------------------------------------------------------------------------

    def announce(self, value: bytes) -> None:
        """Takes the lease, with what others should know of this incarnation in it."""
        lease_ms = round(self._settings.lease_s * 1000)
        self.connection.many(
            [("SET", self._lease, value, "PX", lease_ms), ("SADD", topology.HOLDERS, self.incarnation)]
        )

    def renew(self) -> bool:
        """Prolongs the lease; False where it has lapsed, and what was held may be somebody else's by now."""
        return bool(self.connection.call("PEXPIRE", self._lease, round(self._settings.lease_s * 1000)))

    def resign(self) -> None:
        """Gives the lease back, and whatever is still held after all (a take whose reply was lost)."""
        self.connection.many([("DEL", self._lease), self._recover_command(self.incarnation)])

    def recover(self) -> int:
        """Moves what lapsed holders still hold to `again`; returns how many messages that were."""
        # Ourselves too: a process that thaws after it was forgotten gives back what it has moved since.
        holders = {self.incarnation, *_names(self.connection.call("SMEMBERS", topology.HOLDERS))}
        alive = self.connection.many([("EXISTS", topology.lease(name)) for name in holders])
        lapsed = [name for name, lives in zip(holders, alive, strict=True) if not lives]
        return sum(self.connection.many(map(self._recover_command, lapsed)))

    def _recover_command(self, incarnation: str) -> Command:
        return self._function("recover", (topology.HOLDERS, topology.AGAIN), (incarnation, LISTS_EACH))

    @property
    def _remember(self) -> Command:
        """Goes before every move into a list of ours: whoever has been frozen and forgotten is looked after again."""
        return ("SADD", topology.HOLDERS, self.incarnation)

    # -- the router's side --------------------------------------------------------------------------------------

    def ask_wake(self, wake: Connection) -> None:
        """Waits, on a connection of its own, for the next message of the default lane; it lands in the wake claim.

        The wake-up is itself a durable claim, and the next `claim` takes it over, whether or not the connection has
        answered yet. The wait ends before our lease can lapse, or a frozen router that has been forgotten would still
        be given messages. `woke` takes the answer.
        """
        wait_s = self._settings.lease_s / 2
        self.connection.call(*self._remember)  # not over `wake`: its next readable moment is the wake-up
        wake.send([("BLMOVE", topology.LANE, self._wake_claim, "RIGHT", "LEFT", wait_s)])

    def woke(self, wake: Connection) -> bool:
        """The answer to `ask_wake`: whether a message has landed in the wake claim."""
        return wake.receive(1) != [None]

    def claim(self, number: int, have: int, limit: int) -> list[bytes]:
        """Moves up to `limit` waiting messages, most urgent first, to a claim that already holds `have`.

        Raises Fenced where the claim does not hold what it should.
        """
        claim = topology.claim(self.incarnation, number)
        # What the wake-up brought is older than all that the default list still holds, so it comes first.
        wake = ("LMOVE", self._wake_claim, claim, "RIGHT", "LEFT")
        lengths = [("LLEN", each) for each in (claim, *_SOURCES)]
        marks = ("ZCARD", topology.CANCELLED)
        sent = self.connection.send([self._remember, wake, marks, *lengths])
        remembered, brought, marked, length, *depths = self.connection.receive(sent)
        _checked([remembered, brought, length, *depths])
        self.marks = 0 if isinstance(marked, CommandError) else marked  # nobody's job waits for that
        messages: list[bytes] = [] if brought is None else [brought]
        moves: list[Command] = []
        for source, depth in zip(_SOURCES, depths, strict=True):
            moves += [("LMOVE", source, claim, "RIGHT", "LEFT")] * min(depth, limit - len(messages) - len(moves))
        if moves:
            *moved, length = self.connection.many([*moves, ("LLEN", claim)])
            messages += [message for message in moved if message is not None]
        if length != have + len(messages):
            raise Fenced(f"{claim} holds {length} messages, not the {have + len(messages)} in hand")
        return messages

    def unpark(self, kernel: str) -> int:
        """Moves the parked jobs of a kernel to `again`; returns how many."""
        parked = topology.parked(kernel)
        moved = self._move_all(parked, topology.AGAIN)
        self.connection.call("SREM", topology.PARKED, kernel)
        # A job parked between the two reads keeps the kernel in the index: look once more.
        if self.connection.call("LLEN", parked):
            self.connection.call("SADD", topology.PARKED, kernel)
        return moved

    def _move_all(self, source: str, target: str) -> int:
        """Moves what a list holds now, in its order, a few hundred at a time; returns how many messages that were."""
        moved, depth = 0, self.connection.call("LLEN", source)
        while moved < depth:
            count = min(_MOVED_AT_ONCE, depth - moved)
            found = self.connection.many([("LMOVE", source, target, "RIGHT", "LEFT")] * count)
            if None in found:
                return moved + sum(each is not None for each in found)
            moved += count
        return moved

    def parked_kernels(self) -> set[str]:
        return set(_names(self.connection.call("SMEMBERS", topology.PARKED)))

    def take_back(self, live: Iterable[str]) -> int:
        """Moves what waits in the queues of devices that nobody serves any more to `again`; returns how many.

        A device counts as known once a router has dispatched to it.
        """
        known = set(_names(self.connection.call("SMEMBERS", topology.DEVICES)))
        queues = map(topology.device_queue, known.difference(live))
        return sum(self._move_all(queue, topology.AGAIN) for queue in queues)

    def depths(self, devices: Sequence[str]) -> list[int]:
        """How many messages each device queue holds now."""
        return self.connection.many([("LLEN", topology.device_queue(device)) for device in devices])

    def dispatch(self, step: Dispatch) -> None:
        """Takes messages out of their claims and puts each where it goes, all or nothing.

        Raises Fenced where a claim is no longer exactly what this router put into it (another has adopted it), and
        CommandError where a queue's key holds something else: a transaction that fails half way is not rolled back.
        """
        claims = list(step.claims)
        queues = [*map(topology.device_queue, step.queued), *map(topology.parked, step.parked)]
        sent = self.connection.send([("WATCH", *claims), *(("LLEN", key) for key in claims + queues)])
        _, *lengths = self.connection.receive(sent)
        if lengths[: len(claims)] != list(step.claims.values()):
            self.connection.call("UNWATCH")
            raise Fenced(f"claims {claims} hold {lengths[: len(claims)]}, not {list(step.claims.values())}")
        for found in lengths:
            if isinstance(found, CommandError):
                self.connection.call("UNWATCH")
                raise found
        replies = self.connection.many([("MULTI",), *self._dispatch_commands(step), ("EXEC",)])
        if replies[-1] is None:
            raise Fenced(f"claims {list(step.claims)} changed under our hands")
        self._known_devices |= step.queued.keys()

    def _dispatch_commands(self, step: Dispatch) -> Iterable[Command]:
        for claim in step.claims:
            rest, leaving = step.rests.get(claim, []), step.leaving.get(claim, [])
            if leaving and sum(map(len, leaving)) < sum(map(len, rest)):
                yield from (("LREM", claim, -1, message) for message in leaving)
                continue
            yield ("DEL", claim)
            if rest:
                yield ("LPUSH", claim, *rest)
        if unknown := step.queued.keys() - self._known_devices:
            yield ("SADD", topology.DEVICES, *unknown)
        for device, messages in step.queued.items():
            yield ("LPUSH", topology.device_queue(device), *messages)
        for kernel, messages in step.parked.items():
            yield ("LPUSH", topology.parked(kernel), *messages)
            yield ("SADD", topology.PARKED, kernel)
        for reason, message in step.dead:
            yield ("XADD", topology.DEAD, "MAXLEN", "~", _DEAD_KEPT, "*", "reason", reason, "message", message)
        for outcome in step.rejected:
            yield from self._reject_commands(outcome)
        for minute, placements in step.placements.items():
            pairs = [part for pair in placements.items() for part in pair]
            yield ("HSET", topology.jobs(minute), *pairs)
            yield ("EXPIRE", topology.jobs(minute), self._ttl_s)
        for counter, count in step.counts.items():
            yield ("HINCRBY", topology.COUNTERS, counter, count)
        if cancelled := [outcome.job for outcome in step.rejected if outcome.status == "cancelled"]:
            yield ("ZREM", topology.CANCELLED, *cancelled)
        if step.event:
            yield event_command(step.event, self._settings.events_kept)
        if step.told is not None:
            yield step.told

    def _reject_commands(self, outcome: Outcome) -> Iterable[Command]:
        key = topology.result(outcome.job)
        yield ("SET", key, outcome.record, "NX", "EX", self._ttl_s)
        if outcome.reply_to:
            yield ("RPUSH", outcome.reply_to, outcome.record)
            yield ("EXPIRE", outcome.reply_to, self._ttl_s)
        else:
            yield ("PUBLISH", key, outcome.record)

    # -- the worker's side --------------------------------------------------------------------------------------

    def take(self, device: str, slot: int, limit: int, slots: int, timeout_s: float) -> list[bytes]:
        """Takes up to `limit` messages, oldest first, leaving the other slots their share; [] after `timeout_s`.

        What a lost reply left in the held list is handed out again first.
        """
        queue, held = topology.device_queue(device), topology.held(self.incarnation, slot)
        take = ("BLMOVE", queue, held, "RIGHT", "LEFT", timeout_s)
        sent = self.connection.send([self._remember, take, ("LLEN", queue), ("LLEN", held)])
        _, first, depth, length = _checked(self.connection.receive(sent, timeout_s + 30))
        if first is None and length == 0:
            return []
        if length > 1 or first is None:
            return self.held(slot)
        more = min(limit - 1, -(-depth // slots))
        if more <= 0:
            return [first]
        *moved, length = self.connection.many([*[("LMOVE", queue, held, "RIGHT", "LEFT")] * more, ("LLEN", held)])
        messages = [first, *(message for message in moved if message is not None)]
        return messages if length == len(messages) else self.held(slot)

    def held(self, slot: int) -> list[bytes]:
        """What a slot holds, oldest first."""
        found: list[bytes] = self.connection.call("LRANGE", topology.held(self.incarnation, slot), 0, -1)
        return found[::-1]

    def known(self, jobs: Sequence[str], minutes: Iterable[int]) -> tuple[dict[str, bytes], set[str]]:
        """The placements of these jobs, looked for in the hashes of these minutes, and which are to be cancelled."""
        commands = [("HMGET", topology.jobs(minute), *jobs) for minute in minutes]
        sent = self.connection.send([*commands, ("ZMSCORE", topology.CANCELLED, *jobs)])
        *found, scores = self.connection.receive(sent)
        placements: dict[str, bytes] = {}
        for values in _checked(found):
            placements.update((job, value) for job, value in zip(jobs, values, strict=True) if value is not None)
        return placements, _scored(jobs, scores)

    def ended(self, jobs: Sequence[str]) -> set[str]:
        """Which of these jobs have a final result. Reads no more of it than its state."""
        asked = [("GETRANGE", topology.result(job), 0, _STATE_WITHIN) for job in jobs]
        starts = self.connection.receive(self.connection.send(asked)) if asked else []
        # What is no result at all, a key of another type, is none that stands.
        return {job for job, start in zip(jobs, starts, strict=True) if isinstance(start, bytes) and _is_final(start)}

    def commit(self, step: Commit) -> list[str]:
        """Ends a batch: results, acknowledgement, counters and event in one step; returns the duplicates' ids.

        Raises Fenced, with nothing written, where the lease has lapsed or the batch has been given to another.
        """
        held = topology.held(self.incarnation, step.slot)
        arguments: list[str | bytes | int | float] = [
            step.held,
            self._ttl_s,
            self._settings.events_kept,
            step.event,
        ]
        for outcome in step.outcomes:
            arguments += (outcome.job, outcome.status, outcome.record, outcome.reply_to)
        keys = (held, self._lease, topology.EVENTS, topology.COUNTERS)
        cancelled = [outcome.job for outcome in step.outcomes if outcome.status == "cancelled"]
        try:
            duplicates = self.connection.call(*self._function("commit", keys, arguments))
        except CommandError as error:
            if error.message.startswith("FENCED"):
                raise Fenced(f"{held}: {error.message}") from error
            raise
        if cancelled:  # afterwards, and not with it: a mark that stays behind does no harm
            with suppress(CommandError):
                self.connection.call("ZREM", topology.CANCELLED, *cancelled)
        return [name.decode() for name in duplicates]

    def release(self, slot: int, held: int) -> None:
        """Gives a batch back unrun; Fenced where it is no longer ours."""
        keys = (topology.held(self.incarnation, slot), self._lease, topology.AGAIN)
        try:
            self.connection.call(*self._function("release", keys, (held,)))
        except CommandError as error:
            if error.message.startswith("FENCED"):
                raise Fenced(error.message) from error
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
        """Adds one entry to the event stream."""
        self.connection.call(*event_command(event, self._settings.events_kept))

    def _function(self, name: str, keys: Sequence[str], arguments: Iterable[str | bytes | int | float]) -> Command:
        return ("FCALL", f"lepton_{name}_{self._version}", len(keys), *keys, *arguments)


@cache
def _library() -> tuple[str, str]:
    source = resources.files("queues").joinpath("functions.lua").read_text("utf-8")
    version = hashlib.sha256(source.encode()).hexdigest()[:12]
    return version, source.replace("VERSION", version)


def load_functions(connection: Connection) -> str:
    """Puts this release's functions on the broker (they survive its restart) and returns their version."""
    version, source = _library()
    try:
        connection.call("FUNCTION", "LOAD", source)
    except CommandError as error:
        if error.message.startswith(_NOT_NOW):
            raise BrokerUnavailable(f"the broker refuses to work: {error.message}") from error
        if "already exists" not in error.message:
            raise
    return version


def event_command(event: bytes, kept: int) -> Command:
    """Adds one entry to the event stream, which forgets its oldest beyond `kept`."""
    return ("XADD", topology.EVENTS, "MAXLEN", "~", kept, "*", "e", event)


def announcements(connection: Connection) -> list[Announcement]:
    """Every worker that is alive now."""
    holders = _names(connection.call("SMEMBERS", topology.HOLDERS))
    return read_leases(connection.call("MGET", *map(topology.lease, holders)) if holders else [])


def _names(found: Iterable[bytes]) -> list[str]:
    return [name.decode(errors="replace") for name in found]  # anybody with the broker's password may write there


def _scored(jobs: Sequence[str], scores: Any) -> set[str]:
    """Whose score is there; none where the key is not what it should be: a job must not wait for that."""
    if isinstance(scores, CommandError):
        return set()
    return {job for job, score in zip(jobs, scores, strict=True) if score is not None}


def _is_final(start: bytes) -> bool:
    """As `is_final` in functions.lua: the state stands first in a result, in capitals."""
    found = _STATE.search(start)
    return found is not None and found[1].decode() in FINAL_STATES


def _checked(replies: list[Any]) -> list[Any]:
    for reply in replies:
        if isinstance(reply, CommandError):
            raise reply
    return replies
