"""The slots of a worker: each takes a batch, has it run, commits it with one call, and starts over.

One more slot, behind the others, takes suspects (jobs whose worker died) one at a time, and runs each while the others
hold nothing: so when the worker dies again, it is known whose fault it was.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import structlog

from lepton_ai.errors import BrokerUnavailable, DeviceLost, Fenced
from lepton_ai.ring import RingReader
from lepton_ai.settings import Settings
from lepton_ai.succession import Canvas
from queues.broker import Broker, Stale
from queues.connection import Connection
from queues.steps import Commit
from tasks.chords import ChordParts
from tasks.driver import Driver
from tasks.gate import Gate
from tasks.parity import Parity
from tasks.quarantine import Quarantine
from tasks.runner import Ending, Observer, Runner, Running
from tasks.warmup import Repertoire

__all__ = ["Slots"]

_TAKE_S = 1.0
_RETRY_S = (0.05, 2.0)
#: How often a slot whose lease has lapsed looks whether the heartbeat has taken it again.
_LAPSED_S = 0.1
#: How long suspects keep the others waiting at a time, and how long an empty queue of them is waited for.
_ALONE_S, _ALONE_TAKE_S = 1.0, 0.01
#: Weight of the newest batch in the mean of a message, which bounds the next batch.
_WEIGHT = 0.3

log = structlog.get_logger()


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
        canvas: Canvas,
        quarantine: Quarantine | None = None,
        parity: Parity | None = None,
    ) -> None:
        self.device = device
        self.driver = driver
        self.repertoire = repertoire
        self.observer = observer
        self.settings = settings
        self.incarnation = incarnation
        self.count = driver.slots
        self.gate = Gate()
        # Over before our lease can lapse, or a frozen worker that has been forgotten would still be given jobs.
        self.take_s = min(_TAKE_S, settings.lease_s / 2)
        """How long a slot waits for jobs at a time."""
        self.canvas = canvas
        self.ring = RingReader()
        """Where the arrays are that producers of this host share with us."""
        self.quarantine = quarantine or Quarantine(device)
        self.parity = parity
        self.lost: Callable[[int, Running | None, DeviceLost], object] = _unheeded
        """Told by each slot that finds the device lost, with the launch in which it was."""
        self.chord_parts = ChordParts(self.connect, canvas.finish)
        self._url = url
        self._stopping = threading.Event()
        self._abandoned = threading.Event()
        self._open = threading.Event()
        self._open.set()
        self._threads: list[threading.Thread] = []
        self._slots = [*(_Slot(self, number) for number in range(self.count)), _AloneSlot(self, self.count)]

    def start(self) -> None:
        self.chord_parts.start()
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
        self.chord_parts.close()

    def abandon(self) -> None:
        """Takes nothing more and returns once no slot waits for jobs; what runs goes on, and may commit no more."""
        self._stopping.set()
        self._abandoned.set()
        self._open.set()
        until = time.monotonic() + 2 * _TAKE_S
        for slot, thread in zip(self._slots, self._threads, strict=True):
            if not slot.busy:
                thread.join(max(0.0, until - time.monotonic()))

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    @property
    def abandoned(self) -> bool:
        """Whether the lease is being given up: nothing can be committed any more."""
        return self._abandoned.is_set()

    def wait_open(self) -> None:
        """Waits while paused."""
        self._open.wait()

    def connect(self, number: int | str) -> Broker:
        return Broker(Connection(self._url, f"{self.incarnation}-{number}"), self.incarnation, self.settings)

    def heed(self, broker: Broker) -> None:
        """Tells the kernels that run now of jobs that were cancelled meanwhile."""
        if running := [job for each in self.running for job in each.jobs]:
            self.observer.revoke(broker.marked(running))

    @property
    def running(self) -> list[Running]:
        """The launches that are under way."""
        return [slot.runner.running for slot in self._slots if slot.runner.running is not None]

    @property
    def holding(self) -> dict[int, Sequence[bytes]]:
        """What each slot has taken and not committed, oldest first."""
        return {slot.number: slot.messages for slot in self._slots if slot.messages}

    @property
    def threads(self) -> list[int]:
        """The threads that compute, by the ids that the system has for them."""
        return [thread.native_id for thread in self._threads if thread.native_id is not None]

    @property
    def busy(self) -> int:
        """How many slots are computing now."""
        return sum(slot.busy for slot in self._slots)

    @property
    def busy_s(self) -> float:
        """Seconds that slots have computed since the start, over all of them."""
        return sum(slot.busy_s for slot in self._slots)


class _Slot:
    def __init__(self, slots: Slots, number: int) -> None:
        self.number = number
        self.busy = False
        self.busy_s = 0.0
        self.messages: Sequence[bytes] = ()
        self.runner = Runner(
            slots.settings,
            slots.incarnation,
            slots.device,
            number,
            slots.driver,
            slots.repertoire,
            slots.observer,
            slots.canvas,
            slots.ring,
            slots.quarantine,
            slots.parity,
        )
        self._slots = slots
        self._pending: tuple[Commit, list[Ending]] | None = None
        self._message_s = 0.0
        self._message_bytes = 0.0
        self._message_jobs = 1.0
        self._take_s = slots.take_s

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
            except DeviceLost as error:  # the slot has served: what it holds is given back
                self._slots.lost(self.number, self.runner.broken, error)
                return
            except Exception:  # a defect of ours must not silently cost the worker a slot
                log.exception("slot_failed", slot=self.number)
                if self._slots.stopping:  # nor hold up its end: what is held is given back
                    return
                time.sleep(_RETRY_S[1])

    def _serve(self, broker: Broker) -> None:
        if self._pending is not None:
            self._commit(broker, *self._pending, again=True)
        if held := broker.held(self.number):  # else nobody is kept out of the gate, or waits for it, for nothing
            with self._inside():
                self._work(broker, held)
        while not self._slots.stopping:
            self._slots.wait_open()
            if self._slots.stopping:
                return
            self._turn(broker)

    @contextmanager
    def _inside(self) -> Iterator[None]:
        with self._slots.gate.shared():
            yield

    def _turn(self, broker: Broker) -> None:
        """Takes once, and runs what that brought."""
        with self._inside():
            if self._slots.stopping:  # while it waited to be let in
                return
            limit = self._limit()
            self._work(broker, broker.take(self._slots.device, self.number, limit, self._slots.count, self._take_s))

    def _work(self, broker: Broker, messages: Sequence[bytes]) -> None:
        """Runs and commits what the slot holds."""
        self.runner.stale = 0
        while messages:
            self.messages = messages
            self._pending = self._run(broker, messages)
            messages = self._commit(broker, *self._pending)
        self.messages = ()

    def _run(self, broker: Broker, messages: Sequence[bytes]) -> tuple[Commit, list[Ending]]:
        start = time.perf_counter()
        self.busy = True
        try:
            found = self.runner.run(broker, messages)
        finally:
            self.busy = False
            seconds = time.perf_counter() - start
            self.busy_s += seconds
        count = len(messages)
        mean_bytes = (sum(map(len, messages)) + self.runner.fetched_bytes) / count
        weight = _WEIGHT if self._message_s > 0 else 1.0
        self._message_s += weight * (seconds / count - self._message_s)
        self._message_bytes += weight * (mean_bytes - self._message_bytes)
        self._message_jobs += weight * (1 + found[0].bundled / count - self._message_jobs)
        return found

    def _limit(self) -> int:
        """How many messages to take at once: a full batch of quick ones, a single slow one."""
        settings = self._slots.settings
        if self._message_s <= 0:
            return 1
        fitting = int(settings.batch_bytes / self._message_bytes)
        jobs = int(settings.batch_jobs / self._message_jobs)
        return max(1, min(jobs, int(settings.batch_s / self._message_s), fitting))

    def _commit(self, broker: Broker, step: Commit, endings: Sequence[Ending], *, again: bool = False) -> list[bytes]:
        """Commits; returns what the slot still holds, which is nothing unless the held list is not what was run.

        A commit whose reply was lost is sent again on the next connection: then either it had happened and the held
        list is gone, or it happens now. One that comes while our lease has lapsed waits until the heartbeat has taken
        it again, for as long as nobody has recovered the batch.
        """
        while True:
            try:
                broker.commit(step)
                self._slots.observer.ended(endings)
                if step.chord_parts:
                    self._slots.chord_parts.committed(job for job, _ in step.chord_parts)
                held: list[bytes] = []
                break
            except Stale as error:  # nothing is written: what was run is run anew, with what is there now
                self.runner.stale += 1
                log.info("commit_stale", slot=self.number, reason=str(error))
                self._slots.observer.lost([ending.job for ending in endings])
                held = list(self.messages)
                break
            except Fenced as error:
                held = broker.held(self.number)
                if held == list(self.messages) and not self._slots.abandoned:
                    time.sleep(_LAPSED_S)
                    continue
                # Where it was the answer of an earlier try that was lost, the results stand.
                stand = broker.ended([ending.job for ending in endings])
                self._slots.observer.ended([ending for ending in endings if ending.job in stand])
                self._slots.observer.lost([ending.job for ending in endings if ending.job not in stand])
                if not again or len(stand) < len(endings):
                    broker.count_fenced()
                    log.warning("commit_fenced", slot=self.number, jobs=len(step.outcomes), reason=error.message)
                break
        self._pending = None
        self.messages = ()
        return [] if self._slots.abandoned else held  # that is being given back


def _unheeded(slot: int, broken: Running | None, error: DeviceLost) -> None:
    log.error("device_lost", slot=slot, reason=error.message)


class _AloneSlot(_Slot):
    """Takes suspects, and keeps the gate to itself while it runs them."""

    @contextmanager
    def _inside(self) -> Iterator[None]:
        with self._slots.gate.alone():
            yield

    def _turn(self, broker: Broker) -> None:
        # Taken before the others are sent out of the gate, which they need not leave for nothing.
        messages = broker.take(self._slots.device, self.number, 1, 1, self._take_s, alone=True)
        if not messages:
            return
        self.messages = messages
        with self._inside():
            if self._slots.abandoned:  # it has been given back meanwhile
                return
            until = time.monotonic() + _ALONE_S
            while messages:
                self._work(broker, messages)
                if self._slots.stopping or time.monotonic() >= until:
                    return
                messages = broker.take(self._slots.device, self.number, 1, 1, _ALONE_TAKE_S, alone=True)
