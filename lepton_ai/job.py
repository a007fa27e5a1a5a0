"""A Job and what becomes of it: options, estimate, placement, cost, result. Frozen, the same in every process."""

from __future__ import annotations

import math
from typing import Any, Final

import msgspec

from lepton_ai import blob, topology
from lepton_ai.errors import JobExpired, OptionNotSupported

__all__ = [
    "ENDED",
    "FINAL_STATES",
    "LATEST_S",
    "Candidate",
    "Cost",
    "Elsewhere",
    "Estimate",
    "Meta",
    "Options",
    "Pin",
    "Placement",
    "Record",
    "Setback",
    "state_of",
]

#: Celery's states that end a job, and ours.
_LONGEST_REPLY_TO: Final = 200
_LONGEST_STATE_KEY: Final = 200
_REPLIES: Final = topology.reply("")

FINAL_STATES: Final = {"SUCCESS": "succeeded", "FAILURE": "failed", "REVOKED": "cancelled"}
#: The longest that a job may be held back, in seconds.
LATEST_S: Final = 30 * 86_400.0
#: Our states that end a job. Celery's REVOKED is either of the last two.
ENDED: Final = frozenset({*FINAL_STATES.values(), "expired"})


class Setback(msgspec.Struct, frozen=True, omit_defaults=True):
    """A device that a job has been to, and which could not run it: it goes elsewhere, and has used up no attempt."""

    device: str
    code: str
    """Of the error (`LeptonError.code`), with which the job fails where no device is left."""
    message: str = ""


class Elsewhere(msgspec.Struct, frozen=True):
    """Where a job with setbacks may run; what jobs must share that are placed alike."""

    wanted: str | None
    """The only device, or kind of device."""
    setbacks: tuple[tuple[str, str], ...]
    """Each device that it has been to, with the code of its error there."""

    def code(self, device: str) -> str | None:
        """Why a device is avoided; None where it is not."""
        return next((code for name, code in self.setbacks if name == device), None)

    def __str__(self) -> str:
        where = f"{self.wanted}, but " if self.wanted else ""
        return f"{where}not on {', '.join(name for name, _ in self.setbacks)}"


#: Where a job may run: on a device, on any of a kind, elsewhere than it has been, or on any.
Pin = str | Elsewhere | None
#: More devices than that no job goes to.
_MOST_SETBACKS: Final = 64


class Options(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """The header `lepton` of a message. An option that this release does not honour is refused, never ignored."""

    priority: int | None = None
    #: The only device, or kind of device, that may run the job.
    device: str | None = None
    #: The reply list of the client that waits (`lepton:reply:<client>`).
    reply_to: str | None = None
    #: Sizes of each array argument and the value of each scalar, so that nobody has to open the body.
    shapes: dict[str, Any] | None = None
    #: The encoding of the result: json or msgpack.
    result: str | None = None
    #: The longest that it may run, in seconds; its kernel's own limit where it is unset.
    limit_s: float | None = None
    #: It is refused where it is not likely to end by its deadline (`expires`), nineteen times in twenty.
    must_meet: bool = False
    #: The places of the arrays that are kept outside the message, so that whoever ends the job need not open its body.
    blobs: tuple[str, ...] | None = None
    #: Whose state it is that the job goes on with, and leaves to the next: of its kernel and lane, by this name.
    state_key: str | None = None
    #: How many jobs are in the message (lepton_ai/bundle.py); `shapes` hold for all, numbers as the largest of them.
    bundle: int | None = None
    #: A part of a bundle, whose jobs are noted one by one where they were placed.
    split: bool = False
    #: The devices that gave it back since they could not run it, the last of them last: it goes to none of them again.
    setbacks: tuple[Setback, ...] | None = None

    def checked(self) -> Options:
        """These options; OptionNotSupported names the first that is out of range."""
        if self.priority is not None and not 1 <= self.priority <= 9:
            raise OptionNotSupported(f"priority is 1 (low) to 9 (high), not {self.priority}", "priority")
        if self.reply_to is not None and not (
            self.reply_to.startswith(_REPLIES) and len(self.reply_to) <= _LONGEST_REPLY_TO
        ):
            raise OptionNotSupported(f"reply_to must begin with {topology.reply('')}", "reply_to")
        if self.result not in (None, "json", "msgpack"):
            raise OptionNotSupported(f"result is json or msgpack, not {self.result!r}", "result")
        if self.limit_s is not None and not 0 < self.limit_s < math.inf:
            raise OptionNotSupported(f"limit_s must be above 0 and finite, not {self.limit_s}", "limit_s")
        if self.blobs is not None:
            blob.check_places(self.blobs)
        if self.state_key is not None and not 1 <= len(self.state_key) <= _LONGEST_STATE_KEY:
            told = f"a state key is 1 to {_LONGEST_STATE_KEY} characters, not {len(self.state_key)}"
            raise OptionNotSupported(told, "state_key")
        if self.state_key is not None and self.bundle is not None:
            raise OptionNotSupported("a job with a state key has a message of its own", "state_key")
        if self.must_meet and self.bundle is not None:
            raise OptionNotSupported("a job that must meet its deadline has a message of its own", "must_meet")
        if self.bundle is not None and not 2 <= self.bundle <= topology.MOST_BUNDLED:
            raise OptionNotSupported(f"bundle is 2 to {topology.MOST_BUNDLED} jobs, not {self.bundle}", "bundle")
        if self.setbacks is not None and not (self.bundle is None and 0 < len(self.setbacks) <= _MOST_SETBACKS):
            told = f"setbacks are 1 to {_MOST_SETBACKS}, of a job with a message of its own"
            raise OptionNotSupported(told, "setbacks")
        return self

    @property
    def pin(self) -> Pin:
        """Where it may run."""
        if self.setbacks is None:
            return self.device
        return Elsewhere(self.device, tuple((each.device, each.code) for each in self.setbacks))

    @property
    def urgency(self) -> int:
        return topology.DEFAULT_PRIORITY if self.priority is None else self.priority


#: So many standard deviations of its log above its estimate is what a run exceeds once in twenty. Of a normal law it
#: would be 1.645; runs have heavier tails.
TAIL: Final = 1.75


class Estimate(msgspec.Struct, frozen=True):
    """What a device was predicted to need for a job, in seconds."""

    wait_s: float
    transfer_s: float
    run_s: float
    #: Standard deviation of log(real / predicted run time); 0 before anything was measured.
    spread: float = 0.0

    @property
    def finish_s(self) -> float:
        return self.wait_s + self.transfer_s + self.run_s

    @property
    def tail_s(self) -> float:
        """What transfer and run together exceed once in twenty: what deadlines go by."""
        return self.transfer_s + self.run_s * math.exp(TAIL * self.spread)


class Candidate(msgspec.Struct, frozen=True, omit_defaults=True):
    """A device that was looked at: its estimate, or why it could not be."""

    device: str
    estimate: Estimate | None = None
    excluded: str | None = None


class Placement(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where a job went and why: P5, in one value."""

    job: str
    kernel: str
    state: str
    """`placed` on a device queue, `parked` because no live device can run it, `scheduled` until it is due."""
    reason: str
    placed_at: float
    """Seconds since the epoch, by the router's clock."""
    router: str
    device: str | None = None
    estimate: Estimate | None = None
    candidates: tuple[Candidate, ...] = ()
    policy: str = ""
    shown: bool = False
    """Celery's event listeners (Flower) have been told of the job, and will be told how it goes on."""


class Cost(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a job really cost. Times are of its batch or series, divided by the jobs in it, compilation not counted."""

    worker: str
    device: str
    wait_s: float
    """From the placement until a slot took it."""
    transfer_s: float
    """Decoding, upload and download."""
    run_s: float
    batch: int
    """Jobs that ran in the same launch."""


class Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """What Lepton keeps beside a result."""

    placement: Placement | None = None
    cost: Cost | None = None
    error: dict[str, Any] | None = None


class Meta(msgspec.Struct, frozen=True):
    """Celery's own result record, as its Redis backend reads and writes it, and our Record beside it."""

    status: str
    result: Any = None
    traceback: str | None = None
    children: list[Any] | None = []
    date_done: str | None = None
    task_id: str = ""
    lepton: Record | None = None

    @property
    def record(self) -> Record | None:
        """What Lepton keeps beside the result."""
        return self.lepton


def state_of(meta: Meta | None, placement: Placement | None) -> str:
    """A job's state in our words: waiting, scheduled, placed, parked, succeeded, failed, cancelled or expired."""
    if meta is not None and meta.status in FINAL_STATES:
        record = meta.record if meta.status == "REVOKED" else None
        error = record.error if record is not None else None
        expired = error is not None and error.get("code") == JobExpired.code
        return "expired" if expired else FINAL_STATES[meta.status]
    return placement.state if placement is not None else "waiting"
