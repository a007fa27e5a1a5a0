"""What one step of a router sends: messages to devices and to the parking, a note for each job, and what is told."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import msgspec
import structlog

from lepton_ai import bundle, event
from lepton_ai.event import Event
from pipeline.bundles import counted
from pipeline.endings import leave, noted_in
from pipeline.node import Narrator
from pipeline.notes import Note
from pipeline.window import ClaimedJob
from queues.broker import Kind
from queues.steps import Dispatch

__all__ = ["Outgoing"]

log = structlog.get_logger()


class _Given(msgspec.Struct):
    """What one device is given."""

    messages: dict[str, list[bytes]]
    """By kernel, but for suspects."""
    jobs: list[ClaimedJob]
    seconds: list[float]
    """[job]: predicted transfer and run time."""


class Outgoing:
    """Fills a Dispatch, job by job, in the order in which they should run."""

    def __init__(self, devices: Sequence[str], now: float) -> None:
        self.left: list[ClaimedJob] = []
        """The messages that leave the window."""
        self._devices = devices
        self._now = now
        self._step = Dispatch({}, {})
        self._given = [_Given({}, [], []) for _ in devices]

    def give(self, job: ClaimedJob, device: int, each_s: float) -> None:
        """A message goes to a device, where each of its jobs is predicted to need so long."""
        self._leaves(job)
        here = self._given[device]
        if job.alone:
            self._step.alone.setdefault(self._devices[device], []).append(job.message)
        else:
            here.messages.setdefault(job.kernel, []).append(job.message)
        here.jobs.append(job)
        here.seconds += [each_s] * len(job.ids)

    def park(self, job: ClaimedJob) -> None:
        """A message waits until a device can run it."""
        self._leaves(job)
        step = self._step
        (step.parked_alone if job.alone else step.parked).setdefault(job.kernel, []).append(job.message)
        if job.deadline_at is not None:
            step.deadlines[job.kernel] = min(job.deadline_at, step.deadlines.get(job.kernel, job.deadline_at))

    def note(self, job: ClaimedJob, note: Note, wait: bytes, waits: Sequence[bytes]) -> None:
        """Keeps where the jobs of a message go, and how they wait: of their own device, and of each candidate."""
        here = self._step.placements.setdefault(noted_in(job.id, self._now), {})
        if (shared := bundle.noted_as(job.id, job.options)) is not None:
            here[shared] = bundle.shared_note(note.of(job.id, wait, waits), len(job.ids))
        else:
            here |= {its_id: note.of(its_id, wait, waits) for its_id in job.ids}

    def _leaves(self, job: ClaimedJob) -> None:
        self.left.append(job)
        if len(job.ids) > 1 and job.claim.kind is Kind.NEW:
            counted(self._step, job)

    def dispatch(self, router: str, narrator: Narrator) -> Dispatch:
        """All of it as one step, with the event that tells of it."""
        step, left = self._step, self.left
        leave(step, ((job.claim, job.message) for job in left))
        given = {device: here for device, here in zip(self._devices, self._given, strict=True) if here.jobs}
        events = []
        for device, here in given.items():
            if here.messages:  # those of one kernel side by side, so that a worker can batch them
                step.queued[device] = list(chain.from_iterable(here.messages.values()))
            jobs = tuple([its_id for job in here.jobs for its_id in job.ids])
            data: dict[str, object] = {"seconds": here.seconds}
            if len(here.jobs) < len(jobs):
                data["messages"] = len(here.jobs)
            events.append(Event("job.placed", router, device=device, jobs=jobs, data=data))
        count = sum(len(each.ids) for here in given.values() for each in here.jobs)
        parked_count = sum(len(each.ids) for each in left) - count
        step.counts |= {"placed": count, "parked": parked_count}
        if parked_count:
            going = {id(job) for here in given.values() for job in here.jobs}
            parked = [job for job in left if id(job) not in going]
            events.append(Event("job.parked", router, jobs=tuple(job.id for job in parked)))
            log.warning("jobs_parked", jobs=len(parked), kernels=sorted({job.kernel for job in parked}))
        step.event = event.encode(*events)
        step.told = narrator.placed({device: here.jobs for device, here in given.items()})
        return step
