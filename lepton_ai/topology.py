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
PARKED: Final = "lepton:parked"
DEVICES: Final = "lepton:devices"
DEAD: Final = "lepton:dead"
MODEL: Final = "lepton:model"
CANCELLED: Final = "lepton:cancelled"

DEFAULT_PRIORITY: Final = 5


def lane_list(priority: int) -> str:
    """The list of the default lane that jobs of a Lepton priority (1..9, 9 most urgent) are pushed to."""
    if priority >= 7:
        return LANE + PRIORITY_SUFFIXES[0]
    if priority >= 4:
        return LANE
    return LANE + PRIORITY_SUFFIXES[{3: 2, 2: 3, 1: 4}[priority]]


def lane_lists() -> tuple[str, ...]:
    """Every list of the default lane, most urgent first."""
    return tuple(LANE + suffix for suffix in PRIORITY_SUFFIXES)


def device_queue(device: str) -> str:
    return f"lepton.{device}"


def device_of_queue(queue: str) -> str | None:
    """The device that a queue serves (`lepton.gpu.h100` -> `gpu.h100`), or None for a lane or a foreign queue."""
    if not queue.startswith("lepton.") or queue == LANE or queue.startswith(LANE + "."):
        return None
    return queue.removeprefix("lepton.") or None


def claim(incarnation: str, number: int) -> str:
    return f"lepton:claim:{incarnation}:{number}"


def held(incarnation: str, slot: int) -> str:
    return f"lepton:held:{incarnation}:{slot}"


def lease(incarnation: str) -> str:
    return f"lepton:lease:{incarnation}"


def jobs(minute: int) -> str:
    """The hash of the placements of one minute (minutes since the epoch)."""
    return f"lepton:jobs:{minute}"


def parked(kernel: str) -> str:
    return f"{PARKED}:{kernel}"


def reply(client: str) -> str:
    return f"lepton:reply:{client}"


def result(job_id: str) -> str:
    """Celery's own key for a task's state and result."""
    return f"celery-task-meta-{job_id}"
