"""The names of every queue and key, in one place. Queues are `lepton.<name>`, everything else is `lepton:<name>`."""

from __future__ import annotations

from typing import Final

LANE: Final = "lepton.ingest"
#: kombu appends this and a step to a queue's name for each priority below its highest (`lepton.ingest\x06\x163`).
PRIORITY_SEPARATOR: Final = "\x06\x16"
#: The lists of a lane, most urgent first. kombu writes 0 when no priority was given, so the plain list is "mid".
PRIORITY_SUFFIXES: Final = (PRIORITY_SEPARATOR + "high", "", *(f"{PRIORITY_SEPARATOR}{step}" for step in (3, 6, 9)))

HOLDERS: Final = "lepton:holders"
EVENTS: Final = "lepton:events"
COUNTERS: Final = "lepton:counters"
AGAIN: Final = "lepton:again"
#: Suspects: whoever held them died, so each runs with nothing beside it.
ALONE: Final = "lepton:again.alone"
#: Due times by job id, and the jobs' messages by id: what waits for its `eta` or its retry.
ETA: Final = "lepton:eta"
ETA_MESSAGES: Final = "lepton:eta.messages"
#: How often each job died alone, by id.
ATTEMPTS: Final = "lepton:attempts"
#: The parts of Celery's chords that have ended and are not counted yet, by job id.
CHORD_PARTS: Final = "lepton:chord.parts"
#: Kernels by the earliest deadline among their parked jobs.
DEADLINES: Final = "lepton:deadlines"
#: When a router last looked for lapsed holders, by the server's clock.
SWEPT: Final = "lepton:swept"
#: The lanes of tenants, by name; the default lane is not among them.
LANES: Final = "lepton:lanes"
PARKED: Final = "lepton:parked"
DEVICES: Final = "lepton:devices"
DEAD: Final = "lepton:dead"
MODEL: Final = "lepton:model"
REGRET: Final = "lepton:regret"
#: How many more jobs wait in each lane, or the first claim behind it, than messages, by the lane.
BUNDLED: Final = "lepton:bundled"
CANCELLED: Final = "lepton:cancelled"
#: Kernels that a device may not run (lepton_ai/quarantine.py), by `<kernel> <device>`.
QUARANTINE: Final = "lepton:quarantine"

DEFAULT_PRIORITY: Final = 5
#: Jobs in one message (lepton_ai/bundle.py).
MOST_BUNDLED: Final = 256
_ALONE: Final = ".alone"


def lane_list(priority: int, lane: str = LANE) -> str:
    """The list of a lane that jobs of a Lepton priority (1..9, 9 most urgent) are pushed to."""
    if priority >= 7:
        return lane + PRIORITY_SUFFIXES[0]
    if priority >= 4:
        return lane
    return lane + PRIORITY_SUFFIXES[{3: 2, 2: 3, 1: 4}[priority]]


def lane_lists(lane: str = LANE) -> tuple[str, ...]:
    """Every list of a lane, most urgent first."""
    return tuple(lane + suffix for suffix in PRIORITY_SUFFIXES)


def lane(tenant: str | None) -> str:
    """The lane of a tenant, or the default one."""
    return LANE if tenant is None else f"{LANE}.{tenant}"


def key(job_id: str) -> str:
    """Where the fingerprint of a job is kept whose id was made from an idempotency key."""
    return f"lepton:key:{job_id}"


def device_queue(device: str) -> str:
    return f"lepton.{device}"


def alone_queue(device: str) -> str:
    """The suspects among a device's jobs, which are taken one at a time."""
    return f"lepton.{device}{_ALONE}"


def device_of_queue(queue: str) -> str | None:
    """The device that a queue serves (`lepton.gpu.h100` -> `gpu.h100`), or None for a lane or a foreign queue."""
    if not queue.startswith("lepton.") or queue == LANE or queue.startswith(LANE + ".") or queue.endswith(_ALONE):
        return None
    return queue.removeprefix("lepton.") or None


def claim(incarnation: str, number: int, kind: str = "claim") -> str:
    """A part of a router's window: `claim` of what came from a lane, `reclaim` and `suspects` of what came back."""
    return f"lepton:{kind}:{incarnation}:{number}"


def held(incarnation: str, slot: int) -> str:
    return f"lepton:held:{incarnation}:{slot}"


def backlog(incarnation: str) -> str:
    """What a router knows of the work that is to be done, as of its last heartbeat; it lapses as the lease does."""
    return f"lepton:backlog:{incarnation}"


def carried(lane: str, kernel: str, state_key: str) -> str:
    """Where the state is that jobs of this key carry from one to the next (lepton_ai/carried.py)."""
    return f"lepton:carried:{lane}:{kernel}:{state_key}"


def lease(incarnation: str) -> str:
    return f"lepton:lease:{incarnation}"


def state(incarnation: str) -> str:
    """The ResourceState of a worker as of its last heartbeat; it lapses as the lease does."""
    return f"lepton:state:{incarnation}"


def host(name: str) -> str:
    """What each worker of a host uses of its processors, by incarnation."""
    return f"lepton:host:{name}"


def jobs(minute: int) -> str:
    """The hash of the placements of one minute (minutes since the epoch)."""
    return f"lepton:jobs:{minute}"


def placed(device: str) -> str:
    """The Placement of the job that was sent to a device by itself last, beside its place in `jobs`."""
    return f"lepton:placed:{device}"


def parked(kernel: str) -> str:
    return f"{PARKED}:{kernel}"


def parked_alone(kernel: str) -> str:
    """The suspects among a kernel's parked jobs."""
    return f"{PARKED}{_ALONE}:{kernel}"


def reply(client: str) -> str:
    return f"lepton:reply:{client}"


def ended(job_id: str) -> str:
    """Says of a job whose result is ignored that it has ended."""
    return f"lepton:ended:{job_id}"


def result(job_id: str) -> str:
    """Celery's own key for a task's state and result."""
    return f"celery-task-meta-{job_id}"
