"""A fleet in seeded simulated time, under the policy code that the router runs.

Jobs arrive, one of several routers places each by `Policy.place`, devices work them off first come, first served. What
a router knows is what a real one could: predicted seconds (a job's own may differ), what it gave, and what it saw at
its last look. Replays, benches and scale studies run on this one simulator.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence

import msgspec
import numpy as np

from lepton_ai.placement.problem import UNPLACED, Floats, Indices, Policy, Problem
from lepton_ai.placement.tolls import Tolls

__all__ = ["Fleet", "Outcome", "Stream", "poisson", "simulate"]

#: The longest piece of a window that is placed in one step, as in the router.
_PIECE = 1024


class Fleet(msgspec.Struct, frozen=True):
    """Devices, and what the jobs of a mix cost on each."""

    seconds: Floats
    """[row, device]: predicted; infinite where the device cannot run such jobs."""
    slots: Floats
    """[device]: how many jobs it runs at once, each in the seconds above."""


class Stream(msgspec.Struct, frozen=True):
    """Jobs in the order of their arrival. Those of one instant are placed as one window."""

    at_s: Floats
    """[job]: seconds since the start, never falling."""
    row: Indices
    """[job]: which row of the fleet's seconds it costs."""
    factor: Floats
    """[job]: what it really takes, as a multiple of what was predicted."""


class Outcome(msgspec.Struct, frozen=True):
    """What became of a stream."""

    response_s: Floats
    """[job]: from its arrival to its end; infinite where no device could run it."""
    device: Indices
    """[job]: where it ran, or UNPLACED."""
    busy: Floats
    """[device]: the share of its slots' time, until the last job ended, that it was computing."""


def poisson(rate_hz: float, share: Floats, jobs: int, seed: int | Sequence[int], spread: float = 0.0) -> Stream:
    """Independent arrivals, each of a row with this probability.

    `spread` is the deviation of the logarithm of what a job really takes over what is predicted; the mean stays.
    """
    random = np.random.default_rng(seed)
    at_s = np.cumsum(random.exponential(1 / rate_hz, jobs))
    row = random.choice(len(share), jobs, p=share)
    factor = np.exp(spread * random.standard_normal(jobs) - spread**2 / 2) if spread else np.ones(jobs)
    return Stream(at_s, row, factor)


def simulate(
    policy: Policy,
    fleet: Fleet,
    stream: Stream,
    *,
    routers: int = 1,
    stale_s: float = 0.0,
    credit_s: float = np.inf,
    elapsed: bool = True,
) -> Outcome:
    """The stream's jobs, given to the routers in turn.

    Every `stale_s` a router looks at what all devices have still to do; in between it knows what it gave itself, and
    takes the others to give as much. At 0 it looks before each placement. `credit_s` is how much predicted work a slot
    may have queued before jobs wait in their router's window, to be placed again (a device with a free slot always has
    room). `elapsed` says whether it is known how long the jobs that run have run; else they count in full.
    """
    found = _Run(policy, fleet, stream, routers, stale_s, credit_s, elapsed)
    found.play()
    span_s = found.now_s * fleet.slots
    busy = np.divide(found.computed_s, span_s, out=np.zeros_like(span_s), where=span_s > 0)
    return Outcome(found.response_s, found.device, busy)


class _Devices:
    """What all devices have to do: what runs in their slots, and the jobs in their queues."""

    def __init__(self, fleet: Fleet, elapsed: bool) -> None:
        count = len(fleet.slots)
        self.slots = fleet.slots.astype(np.float64)
        self.free = [list(range(int(slots))) for slots in fleet.slots]
        """[device]: its idle slots."""
        self.queues: list[deque[tuple[int, float]]] = [deque() for _ in range(count)]
        """[device]: jobs, and what they are predicted to take."""
        self._elapsed = elapsed
        self._queued_s = np.zeros(count)
        # [device, slot]: when what runs there is predicted to end, and what it was predicted to take in all.
        self._until_s = np.full((count, int(fleet.slots.max(initial=1))), -np.inf)
        self._whole_s = np.zeros(self._until_s.shape)

    def ready_s(self, now_s: float) -> Floats:
        """[device]: predicted seconds until each has worked off what it has. What runs longer than that ends now."""
        running_s = np.maximum(self._until_s - now_s, 0.0) if self._elapsed else self._whole_s
        found: Floats = (self._queued_s + running_s.sum(axis=1)) / self.slots
        return found

    def queue(self, at: int, job: int, predicted_s: float) -> None:
        self.queues[at].append((job, predicted_s))
        self._queued_s[at] += predicted_s

    def next(self, at: int) -> tuple[int, float]:
        job, predicted_s = self.queues[at].popleft()
        # Exactly nought where nothing is left, so that rounding never adds up.
        self._queued_s[at] = self._queued_s[at] - predicted_s if self.queues[at] else 0.0
        return job, predicted_s

    def begin(self, at: int, now_s: float, predicted_s: float) -> int:
        """The slot that a job takes."""
        slot = self.free[at].pop()
        self._until_s[at, slot] = now_s + predicted_s
        self._whole_s[at, slot] = predicted_s
        return slot

    def end(self, at: int, slot: int) -> None:
        self.free[at].append(slot)
        self._until_s[at, slot] = -np.inf
        self._whole_s[at, slot] = 0.0


class _Router:
    """One router's view of the devices, its window, and what it has learned of their tolls."""

    def __init__(self, devices: _Devices, routers: int, number: int, stale_s: float) -> None:
        self.window: list[int] = []
        self.tolls = Tolls(len(devices.slots), 1 / routers)
        self._devices = devices
        self._routers = routers
        self._stale_s = stale_s
        # Not all at once.
        self._look_s = number / routers * stale_s
        self._seen_s = 0.0
        self._ready_s: Floats = np.zeros(len(devices.slots))

    def ready_s(self, now_s: float) -> Floats:
        """[device]: what it takes each to have still to do."""
        if now_s >= self._look_s:
            self._ready_s = self._devices.ready_s(now_s)
            self._look_s = now_s + self._stale_s
        else:
            self._ready_s = np.maximum(self._ready_s - (now_s - self._seen_s), 0.0)
        self._seen_s = now_s
        return self._ready_s.copy()

    def gave(self, at: int, seconds: float) -> None:
        if self._stale_s:
            self._ready_s[at] += self._routers * seconds / self._devices.slots[at]


class _Run:
    """The events in their order: jobs arrive and end."""

    def __init__(
        self,
        policy: Policy,
        fleet: Fleet,
        stream: Stream,
        routers: int,
        stale_s: float,
        credit_s: float,
        elapsed: bool,
    ) -> None:
        jobs = len(stream.at_s)
        self.now_s = 0.0
        self.response_s = np.full(jobs, np.inf)
        self.device = np.full(jobs, UNPLACED, np.intp)
        self.computed_s = np.zeros(len(fleet.slots))
        self._policy = policy
        self._fleet = fleet
        # Lists: an element of an array costs several times as much to read.
        self._at_s, self._row, self._factor = stream.at_s.tolist(), stream.row, stream.factor.tolist()
        self._devices = _Devices(fleet, elapsed)
        self._routers = [_Router(self._devices, routers, number, stale_s) for number in range(routers)]
        self._credit_s = credit_s
        self._ends: list[tuple[float, int, int, int]] = []
        """When, which job, on which device, in which slot: the next first."""

    def play(self) -> None:
        at_s, turn, routers = self._at_s, 0, self._routers
        first, jobs = 0, len(at_s)
        while first < jobs:
            now_s = at_s[first]
            self._until(now_s)
            last = first + 1
            while last < jobs and at_s[last] == now_s:
                last += 1
            self.now_s = now_s
            routers[turn].window.extend(range(first, last))
            self._place(routers[turn])
            turn = (turn + 1) % len(routers)
            first = last
        self._until(np.inf)

    def _until(self, now_s: float) -> None:
        """Jobs end, and others begin, before this instant or at it."""
        ends, devices = self._ends, self._devices
        while ends and ends[0][0] <= now_s:
            self.now_s, job, at, slot = heapq.heappop(ends)
            self.response_s[job] = self.now_s - self._at_s[job]
            devices.end(at, slot)
            if devices.queues[at]:
                self._begin(at, *devices.next(at))
            for router in self._routers:
                if router.window:
                    self._place(router)

    def _begin(self, at: int, job: int, predicted_s: float) -> None:
        real_s = predicted_s * self._factor[job]
        slot = self._devices.begin(at, self.now_s, predicted_s)
        self.computed_s[at] += real_s
        heapq.heappush(self._ends, (self.now_s + real_s, job, at, slot))

    def _place(self, router: _Router) -> None:
        """Places what waits with a router, the oldest first, and sends on what its devices have room for."""
        tolls, slots = router.tolls, self._devices.slots
        tolls.advance(self.now_s)
        waits = False
        while router.window and not waits:
            window = router.window[:_PIECE]
            seconds = self._seconds(window)
            problem = Problem(
                seconds,
                router.ready_s(self.now_s),
                slots,
                typical_s=tolls.typical_s,
                pressure=tolls.pressure,
                toll=tolls.toll,
            )
            device = self._policy.place(problem).device
            gone = self._send(router, window, seconds, device)
            tolls.placed(problem, device, gone)
            left = [job for job, sent in zip(window, gone, strict=True) if not sent]
            router.window[:_PIECE] = left
            waits = bool(left)

    def _seconds(self, window: list[int]) -> Floats:
        """[job, device] of these jobs. A view where there is one: that costs a third, and is nearly always so."""
        if len(window) == 1:
            row = self._row[window[0]]
            return self._fleet.seconds[row : row + 1]
        return self._fleet.seconds[self._row[window]]

    def _send(self, router: _Router, window: list[int], seconds: Floats, device: Indices) -> list[bool]:
        """Gives jobs to the devices planned for them while these have room; [job]: whether it is gone."""
        gone = [True] * len(window)
        devices = self._devices
        for place, (job, at) in enumerate(zip(window, device.tolist(), strict=True)):
            if at == UNPLACED:
                continue
            if not self._has_room(at):
                gone[place] = False
                continue
            predicted_s = float(seconds[place, at])
            self.device[job] = at
            router.gave(at, predicted_s)
            if devices.free[at]:
                self._begin(at, job, predicted_s)
            else:
                devices.queue(at, job, predicted_s)
        return gone

    def _has_room(self, at: int) -> bool:
        if self._credit_s == np.inf or self._devices.free[at]:
            return True
        return bool(self._devices.ready_s(self.now_s)[at] < self._credit_s)
