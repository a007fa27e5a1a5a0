"""Running a batch: from the messages that a slot has taken to the one commit that ends them all."""

from __future__ import annotations

import math
import random
import time
import traceback
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from operator import mul
from typing import Any, ClassVar, Protocol

import msgspec
import numpy as np
import structlog

from lepton_ai import blob, event, results, wire
from lepton_ai.errors import (
    DeviceLost,
    DeviceOutOfMemory,
    InvalidArguments,
    InvalidRequest,
    JobCancelled,
    JobExpired,
    KernelFailed,
    LeptonError,
    Overloaded,
    RetryJob,
    TimeLimitExceeded,
    TooLarge,
    Unavailable,
)
from lepton_ai.event import Event, Observation
from lepton_ai.identity import minute_of
from lepton_ai.job import LATEST_S, Cost, Estimate, Placement, Record, Setback
from lepton_ai.kernel import Kernel, Retry
from lepton_ai.ring import RingReader
from lepton_ai.settings import Settings
from lepton_ai.signature import MOST_OUTPUT_BYTES
from lepton_ai.succession import PUT_OFF_S, Canvas, FollowUps
from lepton_ai.tensor import SENDABLE
from queues.broker import Broker
from queues.connection import CommandError
from queues.steps import GOES_ON, Commit, DeadLetter, Outcome
from tasks.batching import Group, Refused, TakenJob, Unreadable, answer, groups, magnitude, names, read_all, split
from tasks.carried import Carried
from tasks.driver import Driver
from tasks.limits import kill_after_s, own_limit_s
from tasks.outside import fetch
from tasks.parity import Parity
from tasks.quarantine import Quarantine
from tasks.warmup import Repertoire

__all__ = ["Ending", "Observer", "Runner", "Running"]

#: How long ago a job may have been placed whose id does not say when; a device's queue is short.
_MINUTES_BACK = 10
#: What a launch raises that was too large for its device; NumPy raises the second.
_NO_MEMORY = (DeviceOutOfMemory, MemoryError)
#: The most that outputs may take as nested lists: they hold up every other thread while they are made and written.
_MOST_LISTED_BYTES = 2**24
#: The most that the results of one commit may take; a broker ends connections that send twice as much.
_MOST_COMMIT_BYTES = 2**29
#: How often a batch is run again because states that its jobs carry have changed meanwhile, and for how long those jobs
#: are put off then.
_STALE_RUNS, _STALE_S = 2, (0.05, 0.5)
#: A kernel's progress is told so often at most.
_PROGRESS_S = 0.2

log = structlog.get_logger()


class Ending(msgspec.Struct, frozen=True):
    """How one job ended, for those who watch."""

    job: str
    status: str
    """succeeded, failed, cancelled, expired, dead or retried."""
    at: float
    """Seconds since the epoch."""
    run_s: float = 0.0
    result: str = ""
    """The shapes of its outputs."""
    error: str = ""
    trace: str | None = None


class Observer(Protocol):
    """Who is told what the slots do: Celery's books. Called from slot threads."""

    def taken(self, jobs: Sequence[tuple[str, str]], shown: Collection[str]) -> None:
        """Jobs (id, kernel) are this worker's now; those in `shown` are watched by Celery's event listeners."""

    def started(self, jobs: Sequence[str]) -> None: ...

    def ended(self, endings: Sequence[Ending]) -> None:
        """Jobs have ended, and their results are committed."""

    def lost(self, jobs: Sequence[str]) -> None:
        """Jobs are this worker's no longer, unended."""

    def progressed(self, jobs: Sequence[str], kernel: str, fraction: float) -> None: ...

    def revoke(self, jobs: Collection[str]) -> None:
        """Jobs are to stop, or not to start."""

    def is_revoked(self, job: str) -> bool: ...


class Running(msgspec.Struct, frozen=True):
    """A launch that is under way."""

    slot: int
    jobs: tuple[str, ...]
    started: float
    """Monotonic seconds."""
    kill_after_s: float
    """How long it may take before its worker is ended."""
    by_own_limit: bool
    """Whether that is what the job asked for, and not its kernel's limit."""


class _Note(msgspec.Struct, frozen=True, gc=False):
    """What is read of a Placement that stays where it is: in the hash of the minute that its job's id carries."""

    placed_at: float
    estimate: Estimate | None = None
    shown: bool = False


_Outputs = dict[str, np.ndarray[Any, Any]]
_Limits = tuple[float, bool, float | None]
_NOTE = msgspec.msgpack.Decoder(_Note)
_PLACEMENT = msgspec.msgpack.Decoder(Placement)


class _Launch(msgspec.Struct):
    """The times of one launch and the size of its array arguments, or those of a series in all."""

    transfer_s: float = 0.0
    run_s: float = 0.0
    transfer_bytes: int = 0

    def add(self, other: _Launch) -> None:
        self.transfer_s += other.transfer_s
        self.run_s += other.run_s
        self.transfer_bytes += other.transfer_bytes


class _Lesson(msgspec.Struct):
    """What the launches of a batch that were alike have taught together, and whose jobs succeeded in them."""

    succeeded: list[str] = []
    launches: int = 0
    sizes: dict[tuple[float, ...], int] = {}
    """How many jobs were of which dims."""
    flops: float = 0.0
    bytes: float = 0.0
    transfer_s: float = 0.0
    run_s: float = 0.0
    transfer_bytes: int = 0

    def add(self, jobs: Sequence[TakenJob], launches: int, launch: _Launch) -> None:
        """Folds in so many launches, which took this together."""
        self.launches += launches
        for job in jobs:
            self.flops += job.work.flops
            self.bytes += job.work.bytes
            self.sizes[job.work.dims] = self.sizes.get(job.work.dims, 0) + 1
        self.transfer_s += launch.transfer_s
        self.run_s += launch.run_s
        self.transfer_bytes += launch.transfer_bytes

    def observation(self, kernel: str, device: str, jobs: int) -> Observation:
        """One launch, of so many jobs: the mean of all of them."""
        sums = (self.flops, self.bytes, self.transfer_s, self.run_s, self.transfer_bytes)
        flops, size, transfer_s, run_s, transfer_bytes = (each / self.launches for each in sums)
        return Observation(kernel, device, jobs, flops, size, transfer_s, run_s, transfer_bytes, self._dims())

    def _dims(self) -> tuple[float, ...]:
        """The dims of all jobs, or their mean."""
        first = next(iter(self.sizes))
        if len(self.sizes) == 1:
            return first
        count = sum(self.sizes.values())
        return tuple(sum(map(mul, column, self.sizes.values())) / count for column in zip(*self.sizes, strict=True))


class _Batch(msgspec.Struct):
    """What is known of a batch while it runs, and how its jobs have ended."""

    notes: dict[str, _Note | Placement]
    minutes: set[int]
    """Those in which the jobs' placements stand."""
    taken_at: float
    lessons: dict[tuple[str, int, int, int], _Lesson] = {}
    """By the kernel, the jobs of a launch, and the orders of magnitude of its flops and bytes."""
    outcomes: list[Outcome] = []
    events: list[Event] = []
    endings: list[Ending] = []
    retries: list[tuple[str, float, bytes]] = []
    pushes: list[tuple[str, str, bytes]] = []
    chord_parts: list[tuple[str, bytes]] = []
    dead: list[DeadLetter] = []
    blobs: list[tuple[str, int, str]] = []
    record_bytes: int = 0
    """What its results take so far."""
    carried: Carried = msgspec.field(default_factory=Carried)

    def predicted_s(self, job: TakenJob) -> float:
        """How long a job was predicted to run; infinity where its kernel had not been measured."""
        note = self.notes.get(job.id)
        estimate = note.estimate if note is not None else None
        return estimate.run_s if estimate is not None and estimate.spread > 0 else math.inf


class Runner:
    """Runs the batches of one slot, one after the other."""

    def __init__(
        self,
        settings: Settings,
        incarnation: str,
        device: str,
        slot: int,
        driver: Driver,
        repertoire: Repertoire,
        observer: Observer,
        canvas: Canvas,
        ring: RingReader,
        quarantine: Quarantine,
        parity: Parity | None = None,
    ) -> None:
        self.running: Running | None = None
        """The launch that is under way. May be read from any thread."""
        self.broken: Running | None = None
        """The launch in which the device was lost."""
        self.stale = 0
        """How often the batch in hand was run in vain, because states that its jobs carry had changed meanwhile."""
        self.fetched_bytes = 0
        """Arrays that the last batch read from the broker beside its messages."""
        self._settings = settings
        self._incarnation = incarnation
        self._device = device
        self._slot = slot
        self._driver = driver
        self._repertoire = repertoire
        self._observer = observer
        self._canvas = canvas
        self._ring = ring
        self._quarantine = quarantine
        self._parity = parity

    def run(self, broker: Broker, messages: Sequence[bytes]) -> tuple[Commit, list[Ending]]:
        """Runs what the messages ask for. Raises BrokerUnavailable and DeviceLost, and nothing for what they hold."""
        taken_at = time.time()
        self.fetched_bytes = 0
        settings = self._settings
        try:
            found = self._read(messages)
            notes, marked = self._known(broker, found)
            minutes = _minutes(found)
            batch = _Batch(_notes(notes, minutes), set(minutes.values()), taken_at)
            jobs = self._begin(found, marked, broker.now(), batch)
            jobs = self._carrying(broker, jobs, batch)
            for group in groups(jobs, settings.batch_jobs, settings.batch_bytes, batch.predicted_s):
                self._run_group(broker, group, batch)
        except DeviceLost:
            self.broken = self.running
            raise
        finally:
            self.running = None
        told = event.encode(*self._learned(batch), *batch.events)
        step = Commit(
            self._slot,
            len(messages),
            batch.outcomes,
            told,
            batch.pushes,
            batch.retries,
            batch.chord_parts,
            batch.dead,
            len(found) - len(messages),
            batch.blobs,
            batch.carried.commits(),
            batch.minutes,
        )
        return step, batch.endings

    # -- before -------------------------------------------------------------------------------------------------

    def _read(self, messages: Sequence[bytes]) -> list[TakenJob | Refused | Unreadable]:
        kernels, limit = self._repertoire.kernels, self._settings.body_limit_bytes
        found: list[TakenJob | Refused | Unreadable] = []
        start = time.perf_counter()
        for message in messages:
            jobs = read_all(message, kernels, limit)
            end = time.perf_counter()
            each_s = (end - start) / len(jobs)
            for job in jobs:
                if isinstance(job, TakenJob):
                    job.decode_s = each_s
            start = end
            found += jobs
        return found

    def _known(
        self, broker: Broker, found: Iterable[TakenJob | Refused | Unreadable]
    ) -> tuple[dict[str, bytes], set[str]]:
        """The jobs' placements, in msgpack, and which of them are marked as cancelled."""
        singles: list[str] = []
        bundles: dict[bytes, list[str]] = {}
        for job in found:
            if isinstance(job, TakenJob) and job.noted_together:
                bundles.setdefault(job.message, []).append(job.id)
            elif not isinstance(job, Unreadable):
                singles.append(job.id)
        if not singles and not bundles:
            return {}, set()
        now = int(broker.now()) // 60
        try:
            return broker.known(singles, range(now, now - _MINUTES_BACK, -1), list(bundles.values()))
        except CommandError as error:  # the jobs run all the same, unexplained
            log.error("placements_unreadable", reason=str(error))
            return {}, set()

    def _begin(
        self, found: Sequence[TakenJob | Refused | Unreadable], marked: Collection[str], now: float, batch: _Batch
    ) -> list[TakenJob]:
        """The jobs to run; the others end here. `now` is the server's, in seconds since the epoch."""
        known = [job for job in found if not isinstance(job, Unreadable)]
        self._observer.taken(
            [(job.id, job.kernel if isinstance(job, Refused) else job.kernel.name) for job in known],
            {job for job, note in batch.notes.items() if note.shown},
        )
        jobs: list[TakenJob] = []
        seen: set[str] = set()
        for job in found:
            if isinstance(job, Unreadable):
                log.error("message_unreadable", reason=job.error.message)
                batch.dead.append(DeadLetter("", "", "unreadable", job.error.message, 0, job.message))
                batch.outcomes.append(Outcome("", "dead", b""))
                continue
            if job.id in seen:  # its message was pushed twice, and both copies were taken at once
                batch.outcomes.append(Outcome(job.id, "duplicate", b""))
                continue
            seen.add(job.id)
            if isinstance(job, Refused):
                self._fail(job, job.error, batch)
            elif job.id in marked or self._observer.is_revoked(job.id):
                self._fail(job, JobCancelled("cancelled"), batch)
            elif job.deadline_at is not None and job.deadline_at <= now:
                self._fail(job, JobExpired("its deadline passed before its turn came"), batch)
            elif (reason := self._quarantine.reasons.get(job.kernel.name)) is not None:
                self._send_away(job, f"{job.kernel.name} is quarantined on {self._device}: {reason}", batch)
            else:
                jobs.append(job)
        return jobs

    def _carrying(self, broker: Broker, jobs: list[TakenJob], batch: _Batch) -> list[TakenJob]:
        """The jobs to run, once the states are there that some of them go on with.

        Where others have carried those on while the batch ran, time and again, they are put off: it has other jobs.
        """
        carrying = [job for job in jobs if job.options.state_key is not None]
        if not carrying:
            return jobs
        if self.stale > _STALE_RUNS:
            for job in carrying:
                self._put_off(job, batch, random.uniform(*_STALE_S))
            return [job for job in jobs if job.options.state_key is None]
        ended = batch.carried.load(broker, carrying)
        batch.outcomes += [Outcome(job.id, "duplicate", b"") for job in carrying if job.id in ended]
        self._observer.lost([job.id for job in carrying if job.id in ended])
        return [job for job in jobs if job.id not in ended]

    # -- launches -----------------------------------------------------------------------------------------------

    def _run_group(self, broker: Broker, group: Group, batch: _Batch) -> None:
        """Runs a group, once it has what its jobs keep outside their messages."""
        if group.outside_bytes:
            kill_after_s, *_ = self._limits(group, batch)  # a store may take for ever, too
            self.running = Running(self._slot, names(group.jobs), time.monotonic(), kill_after_s, by_own_limit=False)
            group = self._filled(broker, group, batch)
            self.running = None
            if not group.jobs:
                return
        self._run_together(group, batch)

    def _run_together(self, group: Group, batch: _Batch) -> None:
        """Runs a group in one launch, where it is no series.

        Where that is too large for the device, one half of it runs after the other; where it raises anything else,
        each job runs alone, so that only the culprit fails.
        """
        if group.is_series:
            self._run_series(group, batch)
            return
        jobs = names(group.jobs)
        context = self._start(jobs, group.kernel, self._limits(group, batch))
        self._observer.started(jobs)
        try:
            outputs, launch = self._launch(group.kernel, group.inputs, context)
            parts = split(group, outputs)
        except DeviceLost:
            raise
        except _NO_MEMORY as error:
            half = len(group.jobs) // 2
            log.info("batch_halved", kernel=group.kernel.name, jobs=len(group.jobs), reason=_described(error))
            for jobs_of_half in (group.jobs[:half], group.jobs[half:]):
                self._run_together(Group(group.kernel, jobs_of_half), batch)
            return
        # What a kernel raises, even sys.exit(), is its job's failure and never the worker's.
        except (Exception, SystemExit):  # noqa: BLE001
            for job in group.jobs:
                self._run_series(Group(group.kernel, [job]), batch)
            return
        self.running = None
        ran = [(job, part) for job, part in zip(group.jobs, parts, strict=True) if self._counts(job, context, batch)]
        self._succeed(group, launch, ran, batch)

    def _run_series(self, group: Group, batch: _Batch) -> None:
        """Runs a group's jobs one after the other; one that raises fails, and the others go on."""
        kernel, limits = group.kernel, self._limits(group, batch)
        self._observer.started(names(group.jobs))
        ran: list[tuple[TakenJob, _Outputs]] = []
        taken = _Launch()
        for job in group.jobs:
            context = self._start((job.id,), kernel, limits)
            try:
                inputs = job.inputs if job.options.state_key is None else job.inputs | batch.carried.of(job)
                outputs, launch = self._launch(kernel, inputs, context)
            except DeviceLost:
                raise
            except (Exception, SystemExit) as error:  # noqa: BLE001
                self._kernel_raised(job, error, context, batch)
                continue
            if self._counts(job, context, batch):
                ran.append((job, outputs))
                taken.add(launch)
        self.running = None
        if ran:
            self._succeed(Group(kernel, [job for job, _ in ran]), taken, ran, batch)

    def _start(self, jobs: tuple[str, ...], kernel: Kernel, limits: _Limits) -> _Context:
        """A launch is under way from here on."""
        kill_after_s, by_own_limit, limit_s = limits
        started = time.monotonic()
        self.running = Running(self._slot, jobs, started, kill_after_s, by_own_limit)
        return _Context(jobs, kernel.name, self._observer, started, limit_s, started)

    def _counts(self, job: TakenJob, context: _Context, batch: _Batch) -> bool:
        """Whether what a launch returned is a job's result; else the job ends here."""
        # Its kernel may have seen it and stopped half way, whatever has been forgotten since.
        if context.cancel_told or self._observer.is_revoked(job.id):
            self._fail(job, JobCancelled("cancelled while it ran"), batch)
        elif context.limit_told and job.limit_s is not None:
            self._fail(job, _over(job), batch)
        else:
            return True
        return False

    def _succeed(self, group: Group, launch: _Launch, ran: Sequence[tuple[TakenJob, _Outputs]], batch: _Batch) -> None:
        """Ends the jobs of a group whose launch, or launches, took so long, with their outputs."""
        start = time.perf_counter()
        count = len(group.jobs)
        launch.transfer_s += sum([job.decode_s for job in group.jobs])
        together = 1 if group.is_series else count
        each_transfer_s, each_run_s = launch.transfer_s / count, launch.run_s / count
        encoding = self._settings.result_serializer
        kept: Record | None = None
        of: _Note | Placement | None = None
        succeeded: list[str] = []
        for job, outputs in ran:
            part = outputs
            if job.limit_s is not None and each_run_s > job.limit_s:
                self._fail(job, _over(job), batch)
                continue
            left: bytes | None = None
            if job.options.state_key is not None:
                try:
                    part, left = batch.carried.leave(job, outputs, self._settings.state_bytes)
                except LeptonError as error:
                    self._fail(job, error, batch)
                    continue
            if (size := sum([value.nbytes for value in part.values()])) > (most := _most_bytes(job)):
                hint = "" if job.tensors else "; as msgpack, by a client of Lepton's, it may be larger"
                self._fail(job, TooLarge(f"its outputs take {size} bytes, the limit is {most}{hint}"), batch)
                continue
            note = batch.notes.get(job.id)
            if kept is None or note is not of:  # which the jobs of a bundle share
                wait_s = max(0.0, batch.taken_at - note.placed_at) if note is not None else 0.0
                cost = Cost(self._incarnation, self._device, wait_s, each_transfer_s, each_run_s, together)
                kept, of = Record(note if isinstance(note, Placement) else None, cost), note
            meta = results.success(job.id, answer(job, part), kept)
            follow_ups = None
            if job.sequel is not None:
                try:
                    follow_ups = self._canvas.after_success(job.sequel, meta.result)
                except InvalidRequest as error:  # a result that nobody could act on is none
                    self._fail(job, error, batch)
                    continue
                except Overloaded:
                    self._put_off(job, batch)
                    continue
                except Unavailable:
                    raise
                except Exception as error:  # a job must end, or its batch would be run again for ever
                    log.exception("follow_ups_failed", job=job.id)
                    self._fail(job, InvalidArguments(f"what should follow it: {error!r:.300}", "callbacks"), batch)
                    continue
                meta = msgspec.structs.replace(meta, children=list(follow_ups.children))
            record = results.encode(meta, job.options.result or encoding) if job.keep else b""
            if batch.record_bytes and batch.record_bytes + len(record) > _MOST_COMMIT_BYTES:
                self._put_off(job, batch, _STALE_S[0])
                continue
            if job.seen and (lost := self._lost(job)) is not None:  # the answer may be a view of its arguments
                self._fail(job, lost, batch)
                continue
            if self._parity is not None and self._parity.draws(job):
                self._look_again(self._parity, job, part)
            if follow_ups is not None:
                self._note(job.id, follow_ups, batch)
            if left is not None:
                batch.carried.keep(job, left)
            self._end_blobs(job, 0, batch)
            batch.record_bytes += len(record)
            batch.outcomes.append(Outcome(job.id, "succeeded", record, job.options.reply_to or ""))
            shapes = _shapes(part) if note is not None and note.shown else ""
            batch.endings.append(Ending(job.id, "succeeded", time.time(), each_run_s, shapes))
            succeeded.append(job.id)
        if succeeded:
            launch.transfer_s += time.perf_counter() - start
            self._note_launch(group, launch, succeeded, batch)

    def _limits(self, group: Group, batch: _Batch) -> _Limits:
        """When a launch ends its worker, whether by a job's own limit, and how long its jobs want to run at most."""
        spec, settings = group.kernel.spec, self._settings
        limits = [job.limit_s for job in group.jobs]
        if limits.count(None) == len(limits):
            return *kill_after_s(None, spec, None, settings), None
        notes = [batch.notes.get(job.id) for job in group.jobs]
        longest = max(
            kill_after_s(limit_s, spec, note.estimate if note is not None else None, settings)
            for limit_s, note in zip(limits, notes, strict=True)
        )
        return *longest, own_limit_s(limits)

    def _filled(self, broker: Broker, group: Group, batch: _Batch) -> Group:
        """The group with what its jobs have outside their messages; those who cannot have it fail."""
        found = fetch(
            group.jobs,
            broker.connection,
            self._ring,
            self._settings.blob_limit_bytes,
            self._settings.store_prefixes,
        )
        for job, error in found.failed:
            self._fail(job, error, batch)
        self.fetched_bytes += found.from_broker_bytes
        return Group(group.kernel, found.jobs)

    def _lost(self, job: TakenJob) -> LeptonError | None:
        """Why what was made of a job's arguments is void: their memory may be another job's by now."""
        try:
            for each in job.seen:
                self._ring.check(each)
        except LeptonError as error:
            return error
        return None

    def _look_again(self, parity: Parity, job: TakenJob, outputs: _Outputs) -> None:
        """Has the job computed once more; what it was made of is copied now, as it may be another job's soon."""
        check = parity.copied(job, outputs)
        if check is not None and (not job.seen or self._lost(job) is None):
            parity.offer(check)

    @staticmethod
    def _end_blobs(job: TakenJob | Refused, kept_s: int, batch: _Batch) -> None:
        """What becomes of a job's blobs in the broker: see `Commit.blobs`."""
        if job.options.blobs is not None:
            batch.blobs += [(job.id, kept_s, key) for key in blob.keys(job.id, job.options.blobs)]

    def _launch(self, kernel: Kernel, given: Mapping[str, Any], context: _Context) -> tuple[_Outputs, _Launch]:
        driver, array = self._driver, np.ndarray
        size = 0
        inputs: dict[str, Any] = {}
        outputs: _Outputs = {}
        start = time.perf_counter()
        for key, value in given.items():
            if isinstance(value, array):
                size += value.nbytes
                inputs[key] = driver.upload(value)
            else:
                inputs[key] = value
        uploaded = time.perf_counter()
        found = driver.launch(self._repertoire.runs[kernel.name], inputs, context)
        ran = time.perf_counter()
        if found.keys() != kernel.signature.outputs.keys():
            raise KernelFailed(f"{kernel.name} returned {sorted(found)}, not {sorted(kernel.signature.outputs)}")
        for key, value in found.items():
            output = outputs[key] = driver.download(value)
            if output.dtype.num not in SENDABLE:  # found out here it fails a job; at the commit, the slot for ever
                raise KernelFailed(f"{kernel.name} returned {key!r} of dtype {output.dtype}, which cannot be sent")
        return outputs, _Launch(uploaded - start + time.perf_counter() - ran, ran - uploaded, size)

    @staticmethod
    def _note_launch(group: Group, launch: _Launch, succeeded: Sequence[str], batch: _Batch) -> None:
        """Launches of one kernel that are alike in size are told of together: a batch may have hundreds."""
        launches, jobs = (len(group.jobs), 1) if group.is_series else (1, len(group.jobs))
        alike = group.kernel.name, jobs, *magnitude(group.jobs[0].work)
        lesson = batch.lessons.get(alike)
        if lesson is None:
            lesson = batch.lessons[alike] = _Lesson()
        lesson.succeeded += succeeded
        lesson.add(group.jobs, launches, launch)

    def _learned(self, batch: _Batch) -> list[Event]:
        """What tells of the jobs that succeeded, and of what their launches taught."""
        return [
            Event(
                "job.succeeded",
                self._incarnation,
                kernel,
                self._device,
                tuple(lesson.succeeded),
                lesson.observation(kernel, self._device, jobs),
            )
            for (kernel, jobs, _, _), lesson in batch.lessons.items()
        ]

    # -- other ends ---------------------------------------------------------------------------------------------

    def _kernel_raised(self, job: TakenJob, error: BaseException, context: _Context, batch: _Batch) -> None:
        known = error if isinstance(error, LeptonError) else KernelFailed(_described(error))
        trace = None if isinstance(error, LeptonError) else "".join(traceback.format_exception(error))
        if context.cancel_told or self._observer.is_revoked(job.id):  # what it raised is how it stopped
            return self._fail(job, JobCancelled("cancelled while it ran"), batch, trace)
        if context.limit_told:
            return self._fail(job, _over(job), batch, trace)
        if isinstance(error, _NO_MEMORY):
            told = f"{self._device} has not memory enough for it: {_described(error)}"
            return self._release(job, DeviceOutOfMemory(told), batch, trace)
        policy = job.kernel.spec.retry or (Retry() if isinstance(error, RetryJob) else None)
        if policy is None or isinstance(error, JobCancelled):
            return self._fail(job, known, batch, trace)
        # A kernel that asks for it is retried whatever its policy says of errors.
        asks = isinstance(error, RetryJob) and job.retries < policy.times
        if asks or policy.applies(error, job.retries):
            return self._retry(job, known, policy, batch, trace)
        if job.retries >= policy.times:
            attempts = job.retries + 1
            reason = f"it failed {attempts} times, the last with {known.message}"
            letter = DeadLetter(job.id, job.kernel.name, "retries", reason, attempts, job.own_message(), trace or "")
            batch.dead.append(letter)
            return self._fail(job, known, batch, trace, "dead", attempts=attempts)
        return self._fail(job, known, batch, trace)

    def _retry(self, job: TakenJob, error: LeptonError, policy: Retry, batch: _Batch, trace: str | None) -> None:
        """The job goes on after a while, and its record says so until then."""
        asked = error.delay_s if isinstance(error, RetryJob) else None
        if asked is None or not math.isfinite(asked):
            asked = policy.wait_s(job.retries, random.random())
        delay_s = min(max(0.0, asked), LATEST_S)
        try:
            message = wire.retried(job.own_message())
        except LeptonError:  # it can be read, but not written again
            return self._fail(job, error, batch, trace)
        record = results.encode(results.retrying(job.id, error, trace), self._encoding(job)) if job.keep else b""
        batch.outcomes.append(Outcome(job.id, "retried", record))
        batch.retries.append((job.id, delay_s, message))
        self._end_blobs(job, GOES_ON, batch)
        told = f"{type(error).__name__}({error.message!r})"
        batch.endings.append(Ending(job.id, "retried", time.time(), error=told, trace=trace))
        data = error.to_wire() | {"delay_s": round(delay_s, 3), "retries": job.retries}
        return self._tell("job.retried", job.kernel.name, job.id, data, batch)

    def _release(self, job: TakenJob, error: LeptonError, batch: _Batch, trace: str | None = None) -> None:
        """The job is not for this device: it goes to another, and has used up neither an attempt nor a retry."""
        try:
            message = wire.set_back(job.own_message(), Setback(self._device, error.code, error.message))
        except LeptonError:  # it can be read, but not written again
            return self._fail(job, error, batch, trace)
        batch.outcomes.append(Outcome(job.id, "retried", b""))
        batch.retries.append((job.id, 0.0, message))
        self._end_blobs(job, GOES_ON, batch)
        told = f"{type(error).__name__}({error.message!r})"
        batch.endings.append(Ending(job.id, "retried", time.time(), error=told, trace=trace))
        return self._tell("job.released", job.kernel.name, job.id, error.to_wire(), batch)

    def _send_away(self, job: TakenJob, reason: str, batch: _Batch) -> None:
        """The job of a quarantined kernel is placed anew, after the heartbeat by which routers know that.

        It is no setback: where no other device has the kernel, it waits as a new job would, until that is lifted.
        """
        delay_s, error = self._settings.heartbeat_s, KernelFailed(reason)
        batch.outcomes.append(Outcome(job.id, "retried", b""))
        batch.retries.append((job.id, delay_s, job.own_message()))
        self._end_blobs(job, GOES_ON, batch)
        told = f"{type(error).__name__}({error.message!r})"
        batch.endings.append(Ending(job.id, "retried", time.time(), error=told))
        self._tell("job.released", job.kernel.name, job.id, error.to_wire() | {"delay_s": delay_s}, batch)

    def _fail(
        self,
        job: TakenJob | Refused,
        error: LeptonError,
        batch: _Batch,
        trace: str | None = None,
        status: str | None = None,
        **data: Any,
    ) -> None:
        status = status or _STATUSES.get(type(error), "failed")
        meta = results.failure(job.id, error, trace)
        if job.sequel is not None:
            try:
                self._note(job.id, self._canvas.after_failure(job.sequel, meta), batch)
            except Overloaded:
                if isinstance(job, Refused):
                    raise
                return self._put_off(job, batch)
            except Unavailable:
                raise
            except Exception:  # the failure stands
                log.exception("follow_ups_left_out", job=job.id)
        record = results.encode(meta, self._encoding(job)) if job.keep else b""
        self._end_blobs(job, blob.LETTER_S if status == "dead" else 0, batch)
        batch.outcomes.append(Outcome(job.id, status, record, job.options.reply_to or ""))
        told = f"{type(error).__name__}({error.message!r})"
        batch.endings.append(Ending(job.id, status, time.time(), error=told, trace=trace))
        kernel = job.kernel if isinstance(job, Refused) else job.kernel.name
        return self._tell(f"job.{status}", kernel, job.id, error.to_wire() | data, batch)

    def _put_off(self, job: TakenJob, batch: _Batch, delay_s: float = PUT_OFF_S) -> None:
        """A job that cannot end yet comes again later: the broker has no memory for what follows it, or too much else.

        Nothing is used up by it.
        """
        batch.dead = [letter for letter in batch.dead if letter.job != job.id]
        batch.outcomes.append(Outcome(job.id, "retried", b""))
        batch.retries.append((job.id, delay_s, job.own_message()))
        self._end_blobs(job, GOES_ON, batch)
        batch.endings.append(Ending(job.id, "retried", time.time(), error="put off"))
        log.warning("job_put_off", job=job.id, kernel=job.kernel.name, delay_s=round(delay_s, 3))

    def _note(self, job: str, follow_ups: FollowUps, batch: _Batch) -> None:
        batch.pushes += [(job, queue, message) for queue, message in follow_ups.pushes]
        if follow_ups.chord_part is not None:
            batch.chord_parts.append((job, follow_ups.chord_part))

    def _tell(self, kind: str, kernel: str, job: str, data: dict[str, Any], batch: _Batch) -> None:
        batch.events.append(Event(kind, self._incarnation, kernel, self._device, (job,), data=data))
        log.info(kind.replace(".", "_"), job=job, kernel=kernel, code=data["code"])

    def _encoding(self, job: TakenJob | Refused) -> str:
        return job.options.result or self._settings.result_serializer


def _most_bytes(job: TakenJob) -> int:
    return MOST_OUTPUT_BYTES if job.tensors else _MOST_LISTED_BYTES


_STATUSES: Mapping[type[LeptonError], str] = {JobCancelled: "cancelled", JobExpired: "expired"}


def _minutes(found: Iterable[TakenJob | Refused | Unreadable]) -> dict[str, int]:
    """The minutes that the jobs' ids carry, where they carry one; those of a bundle have one together."""
    minutes: dict[str, int] = {}
    message, minute = b"", None
    for job in found:
        if isinstance(job, Unreadable):
            continue
        if not (isinstance(job, TakenJob) and job.bundled and job.message is message):
            minute = minute_of(job.id)
        message = job.message if isinstance(job, TakenJob) else b""
        if minute is not None:
            minutes[job.id] = minute
    return minutes


def _notes(notes: Mapping[str, bytes], minutes: Container[str]) -> dict[str, _Note | Placement]:
    """What is read of the placements; that of a bundle is read once."""
    known: dict[bytes, _Note | Placement] = {}
    found: dict[str, _Note | Placement] = {}
    try:
        for job, note in notes.items():
            if (read := known.get(note)) is None:
                read = known[note] = (_NOTE if job in minutes else _PLACEMENT).decode(note)
            found[job] = read
        return found
    except msgspec.DecodeError as error:  # the jobs run all the same, unexplained
        log.error("placements_unreadable", reason=str(error))
        return {}


def _over(job: TakenJob) -> TimeLimitExceeded:
    return TimeLimitExceeded(f"it ran longer than its limit of {job.limit_s:g} s")


def _described(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - an exception may raise while it is printed
        return f"{type(error).__name__}, which cannot be printed"


def _shapes(outputs: Mapping[str, np.ndarray[Any, Any]]) -> str:
    return ", ".join(f"{name}={value.dtype}{list(value.shape)}" for name, value in outputs.items())


class _Context(msgspec.Struct, eq=False):
    """What the running variant may ask: see lepton_ai.kernel.Context. One is made a launch, hence a struct."""

    stream: ClassVar[None] = None

    _jobs: tuple[str, ...]
    _kernel: str
    _observer: Observer
    _started: float
    _limit_s: float | None
    _told_at: float
    cancel_told: bool = False
    """The kernel has been told that all its jobs are cancelled."""
    limit_told: bool = False
    """Or that their time is up."""

    @property
    def deadline(self) -> float | None:
        if self._limit_s is None:
            return None
        return max(0.0, self._limit_s - (time.monotonic() - self._started))

    @property
    def cancelled(self) -> bool:
        self.cancel_told = self.cancel_told or all(map(self._observer.is_revoked, self._jobs))
        self.limit_told = self.limit_told or self.deadline == 0.0
        return self.cancel_told or self.limit_told

    def progress(self, fraction: float) -> None:
        """Told to those who follow the events, a few times a second at most."""
        now = time.monotonic()
        if now - self._told_at >= _PROGRESS_S:
            self._told_at = now
            self._observer.progressed(self._jobs, self._kernel, min(1.0, max(0.0, float(fraction))))
