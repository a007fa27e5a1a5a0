"""What moves in one step: a batch that ends, and what leaves a router. Plain values; `broker.py` performs them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

import msgspec

from lepton_ai import topology
from lepton_ai.succession import FollowUps
from queues.connection import Command

__all__ = ["GOES_ON", "Carry", "Commit", "DeadLetter", "Dispatch", "Outcome"]

#: Of a job's blobs in a commit: it goes on, and needs them still.
GOES_ON: Final = -1


class Outcome(msgspec.Struct, frozen=True):
    """How one job of a batch ended. An empty `record` is an ignored result; without `reply_to` it is published."""

    job: str
    status: str
    """succeeded, failed, cancelled, expired, dead, or retried: then the record says so and the job goes on."""
    record: bytes
    reply_to: str = ""


class DeadLetter(msgspec.Struct, frozen=True):
    """A message that is given up, kept for somebody to look at and perhaps to replay."""

    job: str
    kernel: str
    code: str
    """poison: it killed its workers; retries: they are used up; unreadable: it is no job."""
    reason: str
    attempts: int
    message: bytes
    trace: str = ""

    @property
    def words(self) -> tuple[str | bytes | int, ...]:
        """As the server functions take it."""
        return (self.job, self.kernel, self.code, self.reason, self.attempts, self.trace, self.message)


class Carry(msgspec.Struct, frozen=True):
    """A state that jobs of a batch have carried on (lepton_ai/carried.py)."""

    key: str
    version: str
    """Which it must still have: else somebody else has carried it on meanwhile."""
    new_version: str
    value: bytes
    jobs: tuple[str, ...]
    """Those that it has come from: none of them may have ended before."""


class Commit(msgspec.Struct, frozen=True):
    """Everything that ends a batch: its outcomes, what they set off, and the event that tells of them."""

    slot: int
    held: int
    """Messages in the held list: the fence."""
    outcomes: Sequence[Outcome]
    event: bytes
    pushes: Sequence[tuple[str, str, bytes]] = ()
    """Follow-ups, each with its job and its list. What a duplicate would have set off does not happen."""
    retries: Sequence[tuple[str, float, bytes]] = ()
    """Messages that come back, each with its job and after how many seconds."""
    chord_parts: Sequence[tuple[str, bytes]] = ()
    """What is to be counted in Celery's chords, each with its job."""
    dead: Sequence[DeadLetter] = ()
    bundled: int = 0
    """How many more jobs than messages it ends."""
    blobs: Sequence[tuple[str, int, str]] = ()
    """Keys of its jobs' blobs, each with its job and how many seconds it is kept: 0 for none, or GOES_ON. A
    duplicate's are left to themselves for a minute."""
    carried: Sequence[Carry] = ()
    minutes: Collection[int] = ()
    """Those whose placements are kept as long as these results are: what ends a job says no more where it went."""


#: From which claim to which list the oldest message goes, one after the other.
Moves = list[tuple[str, str]]


class Dispatch(msgspec.Struct):
    """Everything that leaves a router in one step. Messages are in the order in which they should run."""

    claims: dict[str, int]
    """Each claim that messages leave, and how many it must hold now: the fence."""
    rests: dict[str, list[bytes]]
    """What stays in each of those claims."""
    leaving: dict[str, list[bytes]] = {}
    """What leaves each of them, oldest first, where that is known: the smaller of the two is what has to be written
    again, where the messages cannot be moved as they are."""
    are_oldest: bool = False
    """Whether what leaves each claim is known to be the oldest in it."""
    queued: dict[str, list[bytes]] = {}
    """Messages by the device they go to."""
    alone: dict[str, list[bytes]] = {}
    """And suspects, which it runs one at a time."""
    parked: dict[str, list[bytes]] = {}
    """Messages by their kernel, which no live device can run."""
    parked_alone: dict[str, list[bytes]] = {}
    deadlines: dict[str, float] = {}
    """The earliest deadline among what is parked now, by kernel, in seconds since the epoch."""
    scheduled: list[tuple[str, float, bytes]] = []
    """Jobs that wait for their time (seconds since the epoch), each with its message."""
    dead: list[DeadLetter] = []
    """Messages that nobody waits for."""
    rejected: list[Outcome] = []
    sequels: dict[str, FollowUps] = {}
    """What the rejected set off, by job."""
    blobs: dict[str, list[str]] = {}
    """The keys of the rejected's blobs, by job, where one has any."""
    placements: dict[int, dict[str, bytes]] = {}
    """Placements by the minute whose hash they go into."""
    counts: dict[str, int] = {}
    bundled: dict[str, int] = {}
    """By the lane: how many more jobs than messages are in it, or in the claims behind it, no longer."""
    event: bytes = b""
    told: Command | None = None
    """A message for Celery's event listeners (queues/celery_events.py)."""

    @property
    def queues(self) -> dict[str, list[bytes]]:
        """What goes to each list that messages can be moved to."""
        return {
            **{topology.device_queue(device): messages for device, messages in self.queued.items()},
            **{topology.alone_queue(device): messages for device, messages in self.alone.items()},
            **{topology.parked(kernel): messages for kernel, messages in self.parked.items()},
            **{topology.parked_alone(kernel): messages for kernel, messages in self.parked_alone.items()},
        }

    def moves(self) -> Moves | None:
        """How messages can be moved as they are; None where they do not leave their claims in the order they go in."""
        if not self.are_oldest or not self.leaving:
            return None
        targets = {id(message): queue for queue, messages in self.queues.items() for message in messages}
        found: Moves = []
        arrived: dict[str, list[int]] = {queue: [] for queue in self.queues}
        for claim, messages in self.leaving.items():
            for message in messages:
                queue = targets.get(id(message))
                if queue is None:
                    return None
                found.append((claim, queue))
                arrived[queue].append(id(message))
        in_order = all(arrived[queue] == list(map(id, messages)) for queue, messages in self.queues.items())
        return found if in_order else None

    @property
    def lone(self) -> tuple[str, bytes] | None:
        """The device and the Placement of the one message that goes to a device, where it is one."""
        if len(self.queued) != 1 or len(self.placements) != 1:
            return None
        ((device, messages),), (notes,) = self.queued.items(), self.placements.values()
        return (device, next(iter(notes.values()))) if len(messages) == len(notes) == 1 else None

    def is_few(self, moves: Moves | None, count: int, size_bytes: int) -> bool:
        """Whether it only moves messages, and so many at most, of so many bytes together."""
        if self.scheduled or self.dead or self.rejected:
            return False
        lists = (self.queues,) if moves is not None else (self.queues, self.rests)
        messages = [message for each in lists for moved in each.values() for message in moved]
        return len(messages) <= count and sum(map(len, messages)) <= size_bytes
