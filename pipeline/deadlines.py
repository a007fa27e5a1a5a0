"""Deadlines at accept: a job that must meet its deadline is refused where it is not likely to.

Likely is nineteen times in twenty, on the device where it would end soonest: after the work that the device was given,
after the jobs that wait and are as urgent, and after its own time as it exceeds it once in twenty. Those that wait go
to whichever device, so each is reckoned as a job of the usual length that all devices share.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from lepton_ai import topology
from lepton_ai.errors import DeadlineUnattainable
from lepton_ai.job import Options
from lepton_ai.placement.costs import CostModel
from pipeline import intake
from pipeline.cluster import Cluster, ServedDevice
from pipeline.intake import Incoming, Refused
from pipeline.pricing import price
from pipeline.window import Claim, ClaimedJob, Window
from queues.broker import Kind

__all__ = ["Backlog", "backlog_of", "combined", "judged", "list_number", "unattainable"]

#: What a kernel takes on a device is not known before so many launches, as many as a router has probed; and how much
#: that varies before so many: until then the estimate itself counts, for a first guess is far out.
_MEASURED: Final = 2
_VARIED: Final = 5
_LISTS: Final = topology.lane_lists()


class Backlog(msgspec.Struct, frozen=True):
    """What a fleet has to do before a job that comes now."""

    seconds: dict[str, float] = {}
    """By device, what it was given, in predicted seconds of one slot."""
    waiting: tuple[int, ...] = (0,) * len(_LISTS)
    """Jobs that no device was given yet, by the list of a lane that they come by, the most urgent first."""
    typical_s: float = 0.0
    """What such a job takes on the device best for it, on the mean."""

    def is_possible(self) -> bool:
        """Whether a router of this release could have told this."""
        numbers = (self.typical_s, *self.seconds.values(), *self.waiting)
        return len(self.waiting) == len(_LISTS) and all(0 <= each < math.inf for each in numbers)

    def shared_s(self, devices: Iterable[ServedDevice], urgency: int) -> float:
        """How long all devices together take for the jobs that wait and are at least as urgent."""
        before = sum(self.waiting[: list_number(urgency) + 1])
        capacity = sum(each.capacity for each in devices)
        return before * self.typical_s / capacity if capacity > 0 else 0.0

    def behind(self, jobs: int, urgency: int) -> Backlog:
        """The same with so many more jobs of an urgency that wait."""
        waiting = list(self.waiting)
        waiting[list_number(urgency)] += jobs
        return msgspec.structs.replace(self, waiting=tuple(waiting))


def backlog_of(cluster: Cluster, window: Window, typical_s: float) -> Backlog:
    """What a router knows of, its own window included."""
    waiting = [0] * len(_LISTS)
    for urgency, count in window.waiting().items():
        waiting[list_number(urgency)] += count
    seconds = {device.name: cluster.outstanding_s(device.name) for device in cluster.devices}
    return Backlog(seconds, tuple(waiting), typical_s)


def combined(backlogs: Iterable[Backlog], lanes: Sequence[int]) -> Backlog:
    """What several routers have told, and what waits for them in lanes, by its list.

    Each knows of the others' work as well as of its own, so of a device the largest counts; what waits in a router
    waits nowhere else.
    """
    found = list(backlogs)
    seconds: dict[str, float] = {}
    for each in found:
        for device, needed_s in each.seconds.items():
            seconds[device] = max(needed_s, seconds.get(device, 0.0))
    waiting = [sum(each) for each in zip(lanes, *(each.waiting for each in found), strict=True)]
    return Backlog(seconds, tuple(waiting), max((each.typical_s for each in found), default=0.0))


def list_number(urgency: int) -> int:
    """Which list of a lane jobs of this urgency come by."""
    return _LISTS.index(topology.lane_list(urgency))


def judged(
    found: Incoming, message: bytes, now: float, backlog: Backlog, cluster: Cluster, model: CostModel
) -> Incoming | Refused:
    """A job as it was, or refused because it must meet a deadline that it cannot; `now` in seconds since the epoch."""
    if found.deadline_at is None or found.deadline_at <= now:  # it has none to meet, or has expired
        return found
    due_in_s = max(0.0, (found.due_at or now) - now)
    left_s, kernel = found.deadline_at - now, found.headers.task
    error = unattainable(kernel, found.options, left_s, backlog, cluster, model, due_in_s=due_in_s, message=message)
    return found if error is None else intake.refused(found, error)


def unattainable(
    kernel: str,
    options: Options,
    left_s: float,
    backlog: Backlog,
    cluster: Cluster,
    model: CostModel,
    *,
    due_in_s: float = 0.0,
    message: bytes = b"",
) -> DeadlineUnattainable | None:
    """Why a job that has `left_s` seconds from now, and is not begun before `due_in_s`, cannot end by then.

    None where it can, and where nobody knows: no device can run it now, or it has not been measured often enough on one
    that can.
    `message` is opened where its options do not declare its shapes.
    """
    job = ClaimedJob(("",), kernel, options, message, Claim(Kind.NEW, 0, ""), 0, (options.urgency, kernel, None))
    candidates = price([job], cluster, model).candidates[0]
    shared_s = backlog.shared_s(cluster.devices, options.urgency)
    waits: dict[str, float] = {}
    ends: dict[str, float] = {}
    for device, candidate in zip(cluster.devices, candidates, strict=True):
        if candidate.estimate is None:
            continue
        if (launches := model.launches(kernel, device.name)) < _MEASURED:
            return None
        estimate = candidate.estimate
        own_s = backlog.seconds.get(device.name, 0.0) / device.capacity
        waits[device.name] = max(due_in_s, own_s + shared_s)
        ends[device.name] = waits[device.name] + (estimate.tail_s if launches >= _VARIED else estimate.finish_s)
    soonest = min(ends, key=ends.__getitem__, default=None)
    if soonest is None or ends[soonest] <= left_s:
        return None
    run_s = ends[soonest] - waits[soonest]
    return DeadlineUnattainable(
        f"it cannot end within {left_s:.3g} s: {soonest}, where it would end soonest, is likely to need "
        f"{ends[soonest]:.3g} s ({waits[soonest]:.3g} s until it begins, and {run_s:.3g} s)",
        "deadline_s",
        estimate_s=ends[soonest],
    )
