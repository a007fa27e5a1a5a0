"""What a policy gets and gives. Plain arrays in, plain arrays out; no clock, no broker, no randomness of its own."""

from __future__ import annotations

from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = ["UNPLACED", "Floats", "Indices", "Plan", "Policy", "Problem", "limited", "planned"]

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

#: The device index of a job that no device can run.
UNPLACED = -1


class Problem(msgspec.Struct, frozen=True):
    """Jobs to place, in the order in which they should be looked at.

    A device of several slots is taken to work its backlog off that many times as fast: a job on it adds
    `seconds / slots` to what those after it wait.
    """

    seconds: Floats
    """[job, device]: transfer and run time; infinite where the device cannot run the job. [job, class] with
    `class_of`."""
    ready: Floats
    """[device]: seconds until the device has finished what it was already given."""
    slots: Floats
    """[device]: how many jobs it runs at once."""
    class_of: Indices | None = None
    """[device]: the column of `seconds` that holds its costs, where devices of one make share a column (a million
    jobs on a thousand devices would be eight gigabytes). `expanded()` gives every device its own."""
    weight: Floats | None = None
    """[job]: what a second of its delay costs, beside the others'; 1 where unset."""
    deadline: Floats | None = None
    """[job]: seconds from now until it must have ended; infinite where it need not."""
    tail: Floats | None = None
    """As `seconds`, but what the time exceeds once in twenty (p95): what deadlines go by. `seconds` where unset."""
    rate: Floats | None = None
    """[device]: what a second of it costs, in money or joules, for policies whose objective that is."""
    typical_s: float | None = None
    """The mean time that jobs lately took on the device best for each; of these jobs where unset."""
    pressure: Floats | None = None
    """[device]: how many jobs a second of what it has to do comes to delay for each second that is added to it, as
    `Tolls` learns it."""
    toll: Floats | None = None
    """[device]: seconds by which a second given to it has lately delayed others, as `Tolls` learns it."""

    @property
    def jobs(self) -> int:
        return len(self.seconds)

    @property
    def devices(self) -> int:
        return len(self.ready)

    def served(self) -> Problem:
        """The same where no job can run on a class that has no devices."""
        if self.class_of is None:
            return self
        empty = np.bincount(self.class_of, minlength=self.seconds.shape[1]) == 0
        if not empty.any():
            return self
        return msgspec.structs.replace(self, seconds=np.where(empty, np.inf, self.seconds))

    def expanded(self) -> Problem:
        """The same with a column for each device."""
        if self.class_of is None:
            return self
        tail = None if self.tail is None else self.tail[:, self.class_of]
        return msgspec.structs.replace(self, seconds=self.seconds[:, self.class_of], tail=tail, class_of=None)

    def seconds_on(self, device: Indices) -> Floats:
        """[job]: seconds of each job on the device that a plan gives it; infinite where unplaced."""
        column = device if self.class_of is None else self.class_of[device]
        found = self.seconds[np.arange(self.jobs), column] if self.jobs and self.devices else np.empty(self.jobs)
        return np.where(device == UNPLACED, np.inf, found)


class Plan(msgspec.Struct, frozen=True):
    """A device for each job, and when each job is then predicted to start."""

    device: Indices
    """[job]: the device's index, or UNPLACED."""
    wait: Floats
    """[job]: seconds before it starts, counting the jobs placed before it; infinite where unplaced."""

    def load(self, problem: Problem) -> Floats:
        """[device]: seconds until it has worked off what it had and what this plan gives it."""
        here = self.device != UNPLACED
        seconds = problem.seconds_on(self.device)
        given = np.bincount(self.device[here], seconds[here], problem.devices)
        return problem.ready + given / problem.slots

    def makespan_s(self, problem: Problem) -> float:
        """Seconds until the last device that this plan gives a job has worked off all of it; 0 for no job."""
        used = np.unique(self.device[self.device != UNPLACED])
        return float(self.load(problem)[used].max(initial=0.0))


class Policy(Protocol):
    """From a Problem to a Plan, for a whole window.

    A class may say two things more: `looks_at_costs = False`, that it is blind to them, and `by_class = True`, that it
    treats the devices of a class together, so that its plan for `expanded()` may be another.
    """

    name: str

    def place(self, problem: Problem) -> Plan: ...


def planned(problem: Problem, device: Indices) -> Plan:
    """The Plan that gives jobs to these devices, each device working its jobs off in the order of the problem."""
    if len(device) == 1 and device[0] != UNPLACED:  # most windows online; a tenth of the time
        return Plan(device, problem.ready[device])
    each = problem.seconds_on(device)
    wait = np.full(problem.jobs, np.inf)
    order = np.argsort(device, kind="stable")
    order = order[device[order] != UNPLACED]
    if order.size:
        chosen = device[order]
        share = each[order] / problem.slots[chosen]
        before = np.cumsum(share) - share
        first = np.flatnonzero(np.diff(chosen, prepend=UNPLACED))
        counts = np.diff(np.append(first, chosen.size))
        # Together first: rounding must not let a job start before its device is ready.
        wait[order] = problem.ready[chosen] + (before - np.repeat(before[first], counts))
    return Plan(device, wait)


def limited(
    problem: Problem,
    share: Floats | None = None,
    memory: Floats | None = None,
    memory_free: Floats | None = None,
) -> Problem:
    """The same within what devices can give: on a device that is half ours a job takes twice as long.

    `share`: [device] 0 to 1, how much of it is ours; at 0 it can run nothing. `memory`: [job] bytes that it needs,
    which have to be within `memory_free`, [device]. What a device was given before (`ready`) stays as it was told.
    """
    share = np.ones(problem.devices) if share is None else share
    free = np.full(problem.devices, np.inf) if memory is None or memory_free is None else memory_free
    column, class_of = np.arange(problem.devices), None
    if problem.class_of is not None:
        # Devices of a class that are limited alike go on sharing a column.
        _, first, class_of = np.unique(
            np.stack([problem.class_of, share, free]), axis=1, return_index=True, return_inverse=True
        )
        column, class_of = problem.class_of[first], class_of.reshape(-1)
        share, free = share[first], free[first]
    fits = np.ones((problem.jobs, 1), bool) if memory is None else memory[:, np.newaxis] <= free
    can = fits & (share > 0)
    slower = np.maximum(share, np.finfo(np.float64).tiny)

    def within(seconds: Floats) -> Floats:
        with np.errstate(over="ignore"):
            return np.where(can, seconds[:, column] / slower, np.inf)

    tail = None if problem.tail is None else within(problem.tail)
    return msgspec.structs.replace(problem, seconds=within(problem.seconds), tail=tail, class_of=class_of)
