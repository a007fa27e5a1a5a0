"""The slots of a worker: each takes a batch, runs it, commits it with one call, and starts over."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import msgspec
import numpy as np
import structlog

from lepton_ai import event, wire
from lepton_ai.errors import BrokerUnavailable, Fenced, JobCancelled, KernelFailed, LeptonError
from lepton_ai.event import Event, Observation
from lepton_ai.identity import minute_of
from lepton_ai.job import Cost, Options, Placement, Record
from lepton_ai.settings import Settings
from lepton_ai.tensor import DTYPES
from queues.broker import Broker, Commit, Outcome
from queues.connection import CommandError, Connection
from tasks.batching import Group, Refused, TakenJob, Unreadable, answer, groups, names, read, split
from tasks.driver import Driver
from tasks.warmup import Repertoire

__all__ = ["Ending", "Observer", "Slots"]

_TAKE_S = 1.0
_RETRY_S = (0.05, 2.0)
#: How long a slot whose commit was refused waits before it runs again what it still holds.
_FENCED_S = 0.5
#: Weight of the newest batch in the mean time of a job, which bounds the next batch.
_WEIGHT = 0.3
#: How long ago a job with a foreign id may have been placed.
_MINUTES_BACK = 10
#: A kernel's progress is told so often at most.
_PROGRESS_S = 0.2
_PLACEMENT = msgspec.msgpack.Decoder(Placement)

log = structlog.get_logger()


class Ending(msgspec.Struct, frozen=True):
    """How one job ended, for those who watch."""

    job: str
    status: str
    """succeeded, failed or cancelled."""
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


class Slots:
    """The slots of one worker, a thread each. `start`, then `drain` (finish what runs) or `abandon`."""

    def __init__(
        self,
        settings: Settings,
        url: str,
        incarnation: str,
        device: str,
        driver: Driver,
        repertoire: Repertoire,
        observer: Observer,
    ) -> None:
        self.device = device
        self.driver = driver
        self.repertoire = repertoire
        self.observer = observer
        self.settings = settings
        self.incarnation = incarnation
        self.count = driver.slots
        self._url = url
        self._stopping = threading.Event()
        self._open = threading.Event()
        self._open.set()
        self._threads: list[threading.Thread] = []
        self._slots = [_Slot(self, number) for number in range(self.count)]

    def start(self) -> None:
        for slot in self._slots:
            thread = threading.Thread(target=slot.run, name=f"slot-{slot.number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def pause(self) -> None:
        """Takes nothing more until `resume`; what runs goes on."""
        self._open.clear()

    def resume(self) -> None:
        self._open.set()

    def drain(self) -> None:
        """Takes nothing more and returns once everything taken has been committed."""
        self._stopping.set()
        self._open.set()
        for thread in self._threads:
            thread.join()

    def abandon(self) -> None:
        """Takes nothing more and returns once no slot waits for jobs; what runs goes on, and may commit no more."""
        self._stopping.set()
        self._open.set()
        for slot, thread in zip(self._slots, self._threads, strict=True):
            if not slot.busy:
                thread.join(2 * _TAKE_S)

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    def wait_open(self) -> None:
        """Waits while paused."""
        self._open.wait()

    def connect(self, number: int) -> Broker:
        return Broker(Connection(self._url, f"{self.incarnation}-{number}"), self.incarnation, self.settings)

    def heed(self, broker: Broker) -> None:
        """Tells the kernels that run now of jobs that were cancelled meanwhile."""
        if running := [job for slot in self._slots for job in slot.running]:
            self.observer.revoke(broker.marked(running))

    @property
    def busy(self) -> int:
        """How many slots are computing now."""
        return sum(slot.busy for slot in self._slots)

    @property
    def busy_s(self) -> float:
        """Seconds that slots have computed since the start, over all of them."""
        return sum(slot.busy_s for slot in self._slots)


class _Ended(msgspec.Struct):
    """How one batch ended, while it is put together."""

    outcomes: list[Outcome] = []
    events: list[Event] = []
    endings: list[Ending] = []


class _Slot:
    def __init__(self, slots: Slots, number: int) -> None:
        self.number = number
        self.busy = False
        self.busy_s = 0.0
        self.running: tuple[str, ...] = ()
        """The jobs whose kernel runs now."""
        self._slots = slots
        self._pending: tuple[Commit, list[Ending]] | None = None
        self._job_s = 0.0
        self._message_bytes = 0.0
        # Over before our lease can lapse, or a frozen worker that has been forgotten would still be given jobs.
        self._take_s = min(_TAKE_S, slots.settings.lease_s / 2)

    def run(self) -> None:
        """Serves until the slots stop, connecting again whenever the broker was lost."""
        pause_s = _RETRY_S[0]
        while not self._slots.stopping or self._pending is not None:
            try:
                broker = self._slots.connect(self.number)
                pause_s = _RETRY_S[0]
                try:
                    self._serve(broker)
                finally:
                    broker.connection.close()
            except BrokerUnavailable as error:
                log.warning("broker_unavailable", slot=self.number, reason=error.message, retry_s=pause_s)
                time.sleep(pause_s)
                pause_s = min(pause_s * 2, _RETRY_S[1])
            except Exception:  # a defect of ours must not silently cost the worker a slot
                log.exception("slot_failed", slot=self.number)
                time.sleep(_RETRY_S[1])

    def _serve(self, broker: Broker) -> None:
        if self._pending is not None:
            self._commit(broker, *self._pending)
        messages = broker.held(self.number)
        while messages or not self._slots.stopping:
            if not messages:
                self._slots.wait_open()
                if self._slots.stopping:
                    return
                messages = broker.take(self._slots.device, self.number, self._limit(), self._slots.count, self._take_s)
            if messages:
                self._pending = self._batch(broker, messages)
                messages = self._commit(broker, *self._pending)

    def _limit(self) -> int:
        """How many jobs to take at once: a full batch of quick ones, a single slow one."""
        settings = self._slots.settings
        if self._job_s <= 0:
            return 1
        fitting = int(settings.batch_bytes / self._message_bytes)
        return max(1, min(settings.batch_jobs, int(settings.batch_s / self._job_s), fitting))

    def _commit(self, broker: Broker, step: Commit, endings: Sequence[Ending]) -> list[bytes]:
        """Commits; returns what the slot still holds, which is nothing unless the commit was refused.

        A commit whose reply was lost is sent again on the next connection: then either it had happened and the held
        list is gone, or it happens now.
        """
        held: list[bytes] = []
        try:
            broker.commit(step)
            self._slots.observer.ended(endings)
        except Fenced as error:
            # Where it was the answer of an earlier try that was lost, the results stand.
            stand = broker.ended([ending.job for ending in endings])
            self._slots.observer.ended([ending for ending in endings if ending.job in stand])
            self._slots.observer.lost([ending.job for ending in endings if ending.job not in stand])
            log.warning("commit_fenced", slot=self.number, jobs=len(step.outcomes), reason=error.message)
            held = broker.held(self.number)
            if held:  # the lease has lapsed and nobody has recovered the batch yet: run it again, but not in a frenzy
                time.sleep(_FENCED_S)
        self._pending = None
        return held

    # -- a batch ------------------------------------------------------------------------------------------------

    def _batch(self, broker: Broker, messages: Sequence[bytes]) -> tuple[Commit, list[Ending]]:
        taken_at = time.time()
        start = time.perf_counter()
        self.busy = True
        try:
            ended = _Ended()
            found = self._read(messages)
            placements, marked = self._known(broker, [job.id for job in found if not isinstance(job, Unreadable)])
            jobs = self._begin(found, placements, marked, ended)
            for group in groups(jobs, self._slots.settings.batch_jobs):
                self._run_group(group, placements, taken_at, ended)
        finally:
            self.busy = False
            self.running = ()
            seconds = time.perf_counter() - start
            self.busy_s += seconds
        each = seconds / len(messages)
        mean_bytes = sum(map(len, messages)) / len(messages)
        weight = _WEIGHT if self._job_s > 0 else 1.0
        self._job_s += weight * (each - self._job_s)
        self._message_bytes += weight * (mean_bytes - self._message_bytes)
        return Commit(self.number, len(messages), ended.outcomes, event.encode(*ended.events)), ended.endings

    def _read(self, messages: Sequence[bytes]) -> list[TakenJob | Refused | Unreadable]:
        kernels, limit = self._slots.repertoire.kernels, self._slots.settings.body_limit_bytes
        found: list[TakenJob | Refused | Unreadable] = []
        for message in messages:
            start = time.perf_counter()
            job = read(message, kernels, limit)
            if isinstance(job, TakenJob):
                job.decode_s = time.perf_counter() - start
            found.append(job)
        return found

    def _begin(
        self,
        found: Sequence[TakenJob | Refused | Unreadable],
        placements: Mapping[str, Placement],
        marked: Collection[str],
        ended: _Ended,
    ) -> list[TakenJob]:
        """The jobs to run; the others end here."""
        known = [job for job in found if not isinstance(job, Unreadable)]
        self._slots.observer.taken(
            [(job.id, job.kernel if isinstance(job, Refused) else job.kernel.name) for job in known],
            {job for job, placement in placements.items() if placement.shown},
        )
        jobs: list[TakenJob] = []
        for job in found:
            if isinstance(job, Unreadable):
                log.error("message_unreadable", reason=job.error.message)
            elif isinstance(job, Refused):
                self._fail(job.id, job.kernel, job.options, job.keep, job.error, ended)
            elif job.id in marked or self._slots.observer.is_revoked(job.id):
                self._fail(job.id, job.kernel.name, job.options, job.keep, JobCancelled("cancelled"), ended)
            else:
                jobs.append(job)
        return jobs

    def _known(self, broker: Broker, ids: Sequence[str]) -> tuple[dict[str, Placement], set[str]]:
        """The jobs' placements, and which of them are marked as cancelled."""
        if not ids:
            return {}, set()
        now = int(time.time()) // 60
        ours = [minute_of(job) for job in ids]
        # A foreign id does not say when it was placed; a device's queue is short.
        back = _MINUTES_BACK if None in ours else 2
        minutes = {minute for minute in ours if minute is not None} | set(range(now, now - back, -1))
        try:
            placements, marked = broker.known(ids, minutes)
            return {job: _PLACEMENT.decode(raw) for job, raw in placements.items()}, marked
        except (CommandError, msgspec.DecodeError) as error:  # the jobs run all the same, unexplained
            log.error("placements_unreadable", reason=str(error))
            return {}, set()

    def _run_group(self, group: Group, placements: dict[str, Placement], taken_at: float, ended: _Ended) -> None:
        """Runs a group in one launch; if that raises, each of its jobs alone, so that only the culprit fails."""
        self.running = names(group.jobs)
        self._slots.observer.started(self.running)
        context = _Context(group, self._slots.observer)
        try:
            outputs, observation = self._launch(group, context)
            parts = split(group, outputs)
        # What a kernel raises, even sys.exit(), is its job's failure and never the worker's.
        except (Exception, SystemExit) as error:  # noqa: BLE001
            if len(group.jobs) > 1:
                for job in group.jobs:
                    self._run_group(Group(group.kernel, [job]), placements, taken_at, ended)
                return
            self._kernel_raised(group.jobs[0], error, ended)
            return
        count = len(group.jobs)
        start = time.perf_counter()
        succeeded: list[str] = []
        for job, part in zip(group.jobs, parts, strict=True):
            # Its kernel may have seen it and stopped half way, whatever has been forgotten since.
            if context.told or self._slots.observer.is_revoked(job.id):
                self._fail(
                    job.id, job.kernel.name, job.options, job.keep, JobCancelled("cancelled while it ran"), ended
                )
                continue
            placement = placements.get(job.id)
            cost = Cost(
                self._slots.incarnation,
                self._slots.device,
                max(0.0, taken_at - placement.placed_at) if placement else 0.0,
                observation.transfer_s / count,
                observation.run_s / count,
                count,
            )
            meta = wire.success(job.id, answer(job, part), Record(placement, cost))
            record = wire.encode_meta(meta, self._encoding(job.options)) if job.keep else b""
            ended.outcomes.append(Outcome(job.id, "succeeded", record, job.options.reply_to or ""))
            shapes = _shapes(part) if placement is not None and placement.shown else ""
            ended.endings.append(Ending(job.id, "succeeded", time.time(), cost.run_s, shapes))
            succeeded.append(job.id)
        if not succeeded:
            return
        ended.events.append(
            Event(
                "job.succeeded",
                self._slots.incarnation,
                group.kernel.name,
                self._slots.device,
                tuple(succeeded),
                msgspec.structs.replace(observation, transfer_s=observation.transfer_s + time.perf_counter() - start),
            )
        )

    def _launch(self, group: Group, context: _Context) -> tuple[dict[str, np.ndarray[Any, Any]], Observation]:
        driver, name = self._slots.driver, group.kernel.name
        start = time.perf_counter()
        inputs = {
            name: driver.upload(value) if isinstance(value, np.ndarray) else value
            for name, value in group.inputs.items()
        }
        uploaded = time.perf_counter()
        found = self._slots.repertoire.runs[name](inputs, context)
        driver.synchronize()
        ran = time.perf_counter()
        if found.keys() != group.kernel.signature.outputs.keys():
            raise KernelFailed(f"{name} returned {sorted(found)}, not {sorted(group.kernel.signature.outputs)}")
        outputs = {key: driver.download(value) for key, value in found.items()}
        for key, value in outputs.items():
            if value.dtype.name not in DTYPES:  # found out here it fails a job; at the commit, the slot for ever
                raise KernelFailed(f"{name} returned {key!r} of dtype {value.dtype}, which cannot be sent")
        transfer_s = uploaded - start + time.perf_counter() - ran + sum(job.decode_s for job in group.jobs)
        flops, moved = sum(job.work.flops for job in group.jobs), sum(job.work.bytes for job in group.jobs)
        device = self._slots.device
        size = sum(job.size_bytes for job in group.jobs)
        return outputs, Observation(name, device, len(group.jobs), flops, moved, transfer_s, ran - uploaded, size)

    def _kernel_raised(self, job: TakenJob, error: BaseException, ended: _Ended) -> None:
        known = error if isinstance(error, LeptonError) else KernelFailed(_described(error))
        trace = None if isinstance(error, LeptonError) else "".join(traceback.format_exception(error))
        self._fail(job.id, job.kernel.name, job.options, job.keep, known, ended, trace)

    def _fail(
        self,
        job: str,
        kernel: str,
        options: Options,
        keep: bool,
        error: LeptonError,
        ended: _Ended,
        trace: str | None = None,
    ) -> None:
        status = "cancelled" if isinstance(error, JobCancelled) else "failed"
        record = wire.encode_meta(wire.failure(job, error, trace), self._encoding(options)) if keep else b""
        ended.outcomes.append(Outcome(job, status, record, options.reply_to or ""))
        told = f"{type(error).__name__}({error.message!r})"
        ended.endings.append(Ending(job, status, time.time(), error=told, trace=trace))
        ended.events.append(
            Event(f"job.{status}", self._slots.incarnation, kernel, self._slots.device, (job,), data=error.to_wire())
        )
        log.info("job_ended", status=status, job=job, kernel=kernel, code=error.code)

    def _encoding(self, options: Options) -> str:
        return options.result or self._slots.settings.result_serializer


def _described(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - an exception may raise while it is printed
        return f"{type(error).__name__}, which cannot be printed"


def _shapes(outputs: Mapping[str, np.ndarray[Any, Any]]) -> str:
    return ", ".join(f"{name}={value.dtype}{list(value.shape)}" for name, value in outputs.items())


class _Context:
    """What the running variant may ask. See lepton_ai.kernel.Context."""

    deadline = None
    stream = None

    def __init__(self, group: Group, observer: Observer) -> None:
        self._jobs = names(group.jobs)
        self._kernel = group.kernel.name
        self._observer = observer
        self._told_at = time.monotonic()
        self.told = False
        """The kernel has been told that all its jobs are cancelled."""

    @property
    def cancelled(self) -> bool:
        self.told = self.told or all(map(self._observer.is_revoked, self._jobs))
        return self.told

    def progress(self, fraction: float) -> None:
        """Told to those who follow the events, a few times a second at most."""
        now = time.monotonic()
        if now - self._told_at >= _PROGRESS_S:
            self._told_at = now
            self._observer.progressed(self._jobs, self._kernel, min(1.0, max(0.0, float(fraction))))
