"""The router's live picture of the fleet: who is alive, what they can run, what they still have to do."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable

import msgspec

from lepton_ai.device import Announcement, Peaks, ResourceState
from lepton_ai.errors import InvalidKernel, LeptonError, from_wire
from lepton_ai.job import Elsewhere, Options, Pin
from pipeline.sized import Offer, Sized

__all__ = ["Cluster", "ServedDevice"]

#: Work of a device whose queue is empty is forgotten so long after it was dispatched: its event has been missed.
_FORGET_S = 30.0
#: So many jobs are remembered at most, the newest: far more than all devices' credit, unless their ends are not told.
_MOST_OUTSTANDING = 1_000_000
#: No job is taken to need longer (30 years), whatever sizes it declares: of larger numbers the sums lose the others.
_LONGEST_S = 1e9
#: What another's job is taken to cost where we have none of our own to go by.
_FOREIGN_S = 1e-3


class ServedDevice(msgspec.Struct, frozen=True):
    """A device with the live workers that serve it taken together."""

    name: str
    kind: str
    slots: int
    peaks: Peaks
    kernels: frozenset[str]
    share: float = 1.0
    """How much of its usual work it may be given in the state that it is in; 0 is none."""
    reason: str = ""
    """Why that is less than all."""
    speed: float = 1.0
    """How fast it computes beside what else its hosts do, as a share of what it can alone."""
    quarantined: dict[str, str] = {}
    """Kernels that one of its workers has, and may not run, with the reason."""

    @property
    def capacity(self) -> float:
        """How many jobs it may be counted on to run at once: its slots, as far as they may be used."""
        return self.slots * self.share

    def can_run(self, kernel: str, pin: Pin) -> bool:
        """Whether a job of this kernel, perhaps pinned, may run here now."""
        return self.share > 0 and self.serves(kernel, pin)

    def serves(self, kernel: str, pin: Pin) -> bool:
        """As `can_run`, were it within its limits."""
        return kernel in self.kernels and self.matches(pin)

    def matches(self, pin: Pin) -> bool:
        """Whether a job that is pinned so may run here."""
        if isinstance(pin, Elsewhere):
            return self.matches(pin.wanted) and pin.code(self.name) is None
        return pin is None or pin in (self.name, self.kind)

    def excludes(self, kernel: str, pin: Pin) -> str:
        """Why it cannot run a job of this kernel now."""
        if kernel not in self.kernels:
            if (reason := self.quarantined.get(kernel)) is not None:
                return f"its {kernel} is quarantined: {reason}"
            return f"announces no {kernel}"
        wanted = pin.wanted if isinstance(pin, Elsewhere) else pin
        if not self.matches(wanted):
            return f"the job is pinned to {wanted}"
        if isinstance(pin, Elsewhere) and (code := pin.code(self.name)) is not None:
            return f"the job has been there, and it came back: {code}"
        return self.reason


class _Outstanding(msgspec.Struct, frozen=True):
    device: str
    seconds: float
    since: float
    share: float


class _Load(msgspec.Struct):
    """What a device has still to do: our jobs, their predicted seconds and messages, and how much others put there."""

    seconds: float = 0.0
    jobs: int = 0
    messages: float = 0.0
    foreign: int = 0


class Cluster:
    """Devices in the order of their names, and the work that each was given and has not reported done."""

    def __init__(self) -> None:
        self.devices: tuple[ServedDevice, ...] = ()
        self._workers: dict[str, Announcement] = {}
        self._states: dict[str, ResourceState] = {}
        """By incarnation, as of the last heartbeat."""
        self.recovered = False
        """A device that was beyond its limits is back since the last refresh: what was parked for it can run."""
        self._offers: dict[str, Offer] = {}
        self.sized: dict[Hashable, Sized] = {}
        """Of jobs that have been priced, by what `pipeline.sized` knows them by, since the fleet was another."""
        self._outstanding: dict[str, _Outstanding] = {}
        self._loads: defaultdict[str, _Load] = defaultdict(_Load)
        """Foreign jobs are those that were placed before our time: other routers', or ours in an earlier life."""

    def refresh(self, announcements: Iterable[Announcement]) -> bool:
        """Takes over who is alive now; True where that changed what can run."""
        workers = {each.incarnation: each for each in announcements}
        if workers == self._workers and not self.recovered:
            return False
        self.recovered = False
        self._workers = workers
        self._states = {incarnation: each for incarnation, each in self._states.items() if incarnation in workers}
        self._offers, self.sized = {}, {}
        for spec in itertools.chain.from_iterable(each.kernels for each in workers.values()):
            if spec.name not in self._offers:
                try:
                    self._offers[spec.name] = Offer.of(spec)
                except InvalidKernel:
                    continue  # a worker of another release: its kernel cannot be priced here, so it is not offered
        by_device = sorted(workers.values(), key=lambda each: each.device)
        self.devices = tuple(
            self._in_its_state(self._served(name, list(group)))
            for name, group in itertools.groupby(by_device, lambda each: each.device)
        )
        return True

    def heard(self, worker: str, state: ResourceState) -> None:
        """A worker, by its incarnation, has told of its state; what is none counts for nothing."""
        if (announced := self._workers.get(worker)) is None or not state.is_possible():
            return
        self._states[worker] = state
        found = list(self.devices)
        at = next(at for at, each in enumerate(found) if each.name == announced.device)
        before = found[at].share
        found[at] = self._in_its_state(found[at])
        self.devices = tuple(found)
        self.recovered |= before <= 0 < found[at].share

    def speed_of(self, worker: str) -> float:
        """How fast a worker, by its incarnation, computes beside what else its host does; 1 where it is unknown."""
        state = self._states.get(worker)
        return 1.0 if state is None else state.speed

    def share(self, device: str) -> float:
        """How much of its usual work a device may be given, 0 to 1; 1 where it is unknown."""
        found = self.device(device)
        return 1.0 if found is None else found.share

    @property
    def kernels(self) -> Collection[str]:
        """The kernels that a live worker announces."""
        return self._offers.keys()

    def offer(self, kernel: str) -> Offer | None:
        """What is known of a kernel, or None where no live worker announces it."""
        return self._offers.get(kernel)

    def gives_up(self, kernel: str, options: Options) -> LeptonError | None:
        """With what a job fails that has been to every device which could run it; None while one is left.

        Where none of those is alive that it has been to, it waits as any other: they may all be about to start again.
        """
        if not options.setbacks or any(each.serves(kernel, options.pin) for each in self.devices):
            return None
        tried = {each.device for each in options.setbacks}
        if not any(each.name in tried for each in self.devices):
            return None
        last = options.setbacks[-1]
        been = ", ".join(each.device for each in options.setbacks)
        told = f"no device is left for it (it has been to {been}): {last.message}"
        return from_wire({"code": last.code, "message": told})

    def device(self, name: str) -> ServedDevice | None:
        return next((device for device in self.devices if device.name == name), None)

    def dispatched(self, job: str, device: str, seconds: float, share: float = 1.0) -> None:
        """A job was given to a device, and was predicted to take so long there; `share` is its part of its message."""
        if job in self._outstanding:
            self.finished(job)
        elif len(self._outstanding) >= _MOST_OUTSTANDING:
            self.finished(next(iter(self._outstanding)))
        seconds = min(seconds, _LONGEST_S)
        self._outstanding[job] = _Outstanding(device, seconds, time.monotonic(), share)
        load = self._loads[device]
        load.seconds += seconds
        load.jobs += 1
        load.messages += share

    def finished(self, job: str, device: str | None = None) -> None:
        """A job has ended, on a device; unknown ones are other routers'."""
        known = self._outstanding.pop(job, None)
        if known is not None:
            load = self._loads[known.device]
            load.jobs -= 1
            # Exactly nought when nothing is left, so that rounding never adds up.
            load.seconds = load.seconds - known.seconds if load.jobs else 0.0
            load.messages = load.messages - known.share if load.jobs else 0.0
        elif device is not None and (load := self._loads[device]).foreign > 0:
            load.foreign -= 1

    def outstanding_s(self, device: str) -> float:
        """Predicted seconds of work that a device has still to do, for one slot; others' jobs count as our mean one."""
        load = self._loads[device]
        if not load.foreign:
            return load.seconds
        return load.seconds + load.foreign * (load.seconds / load.jobs if load.jobs else _FOREIGN_S)

    def outstanding_jobs(self, device: str) -> int:
        load = self._loads[device]
        return load.jobs + load.foreign

    def reconcile(self, device: str, depth: int) -> None:
        """Corrects the picture by the length of a device's queue.

        What is more than the messages that we put there is others'; and where it is empty, our own old work is
        forgotten: the event that ended it was missed.
        """
        load = self._loads[device]
        load.foreign = max(0, depth - round(load.messages))
        if depth == 0:
            before = time.monotonic() - _FORGET_S
            for job in [j for j, o in self._outstanding.items() if o.device == device and o.since < before]:
                self.finished(job)

    def _served(self, name: str, workers: list[Announcement]) -> ServedDevice:
        # What every worker can run: any of them may take the job, and one without the kernel would fail it.
        each_runs = [{spec.name for spec in each.kernels} for each in workers]
        kernels = frozenset(self._offers).intersection(*each_runs)
        slots = sum(each.slots for each in workers)
        quarantined = {kernel: reason for each in workers for kernel, reason in each.quarantined.items()}
        return ServedDevice(name, workers[0].kind, slots, workers[0].peaks, kernels, quarantined=quarantined)

    def _in_its_state(self, device: ServedDevice) -> ServedDevice:
        """The device as its workers last told, each by its part of the slots; one that told nothing is well."""
        share = speed = 0.0
        reasons: list[str] = []
        for each in self._workers.values():
            if each.device != device.name:
                continue
            state = self._states.get(each.incarnation)
            share += each.slots * (1.0 if state is None else state.share)
            speed += each.slots * (1.0 if state is None else state.speed)
            if state is not None and state.reason and state.reason not in reasons:
                reasons.append(state.reason)
        told = "; ".join(reasons)
        return msgspec.structs.replace(device, share=share / device.slots, speed=speed / device.slots, reason=told)
