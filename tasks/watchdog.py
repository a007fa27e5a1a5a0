"""The watchdog: ends the worker's process when a kernel runs past its limit, since a thread cannot be ended.

Before that it gives back what the others hold, so that the culprit alone is found in the list of a dead worker, and
counts an attempt. A supervisor (`lepton up`, systemd, Kubernetes) starts the next process.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from typing import Final

import structlog

from lepton_ai import bundle, event, results, wire
from lepton_ai.errors import Fenced, LeptonError, TimeLimitExceeded
from lepton_ai.event import Event
from lepton_ai.settings import Settings
from lepton_ai.succession import FollowUps, sequel_of
from queues.broker import Broker
from queues.steps import Commit, Outcome
from tasks.runner import Running
from tasks.slots import Slots

__all__ = ["EXIT_CODE", "Watchdog", "jobs_of"]

#: How the process ends: sysexits.h calls it a temporary failure.
EXIT_CODE: Final = 75
_LOOK_S: Final = 0.25
#: So long it may take to give things back; then the process ends as it is, and all it held is under suspicion.
_PATIENCE_S: Final = 5.0

log = structlog.get_logger()


class Watchdog:
    """Looks at the running launches until it is stopped."""

    def __init__(self, settings: Settings, slots: Slots, end: Callable[[int], object] = os._exit) -> None:
        self._settings = settings
        self._slots = slots
        self._end = end
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.wait(_LOOK_S):
            now = time.monotonic()
            for running in self._slots.running:
                if now - running.started > running.kill_after_s and self._bark(running):
                    return

    def _bark(self, culprit: Running) -> bool:
        """Ends the process; False where the culprit has come to an end in this very moment."""
        messages = self._slots.holding.get(culprit.slot, ())
        if culprit not in self._slots.running or not messages:
            return False
        log.error(
            "kernel_over_its_limit",
            jobs=culprit.jobs,
            slot=culprit.slot,
            limit_s=round(culprit.kill_after_s, 3),
            ending="this process; what else it holds is given back",
        )
        # The broker may be what is slow: nothing of it may keep a hung process alive.
        last_resort = threading.Timer(_PATIENCE_S, self._end, (EXIT_CODE,))
        last_resort.daemon = True
        last_resort.start()
        try:
            broker = self._slots.connect("watchdog")
            with closing(broker.connection):
                if not self._leave_alone(broker, culprit, messages):
                    last_resort.cancel()
                    return False
                self._slots.pause()
                time.sleep(self._slots.take_s)  # until whoever waits for jobs has none, or holds what came last
                self._give_back_others(broker, culprit)
                if len(culprit.jobs) == 1 and culprit.by_own_limit:
                    with suppress(Fenced):  # it has been committed a moment ago
                        self._refuse(broker, culprit)
                broker.resign_as_dead()
        except Exception:  # whatever it is, the kernel hangs: what is held is under suspicion then
            log.exception("given_back_in_part")
        self._end(EXIT_CODE)
        return True

    def _leave_alone(self, broker: Broker, culprit: Running, messages: Sequence[bytes]) -> bool:
        """Gives back the rest of the culprit's batch; False where that has been committed: nobody hangs."""
        try:
            broker.release(culprit.slot, messages, _flags(messages, culprit))
        except Fenced:  # given to another while our lease had lapsed, it hangs here all the same
            return culprit in self._slots.running
        return True

    def _give_back_others(self, broker: Broker, culprit: Running) -> None:
        for slot, messages in self._slots.holding.items():
            if slot != culprit.slot:
                # What waits for its turn alone stays a suspect.
                flags = ("!" if slot == self._slots.count else ".") * len(messages)
                with suppress(Fenced):  # it has committed a moment ago
                    broker.release(slot, messages, flags)

    def _refuse(self, broker: Broker, culprit: Running) -> None:
        """A job that asked for its limit itself has had it, and is not tried again."""
        held = broker.held(culprit.slot)
        if not held:
            return
        envelope = wire.read_envelope(held[0])
        headers = envelope.headers
        options = wire.read_options(headers)
        if len(held) != 1 or headers.id != culprit.jobs[0] or options.bundle is not None:
            return
        error = TimeLimitExceeded(f"it ran on after its limit; its worker was ended after {culprit.kill_after_s:g} s")
        meta = results.failure(headers.id, error)
        sets_off = FollowUps()
        embed = wire.read_embed(envelope, limit_bytes=self._settings.body_limit_bytes)
        if (sequel := sequel_of(headers, embed)) is not None:
            sets_off = self._slots.canvas.after_failure(sequel, meta)
        told = Event(
            "job.failed", self._slots.incarnation, headers.task, self._slots.device, (headers.id,), data=error.to_wire()
        )
        encoded = results.encode(meta, options.result or self._settings.result_serializer)
        outcome = Outcome(headers.id, "failed", b"" if headers.ignore_result else encoded, options.reply_to or "")
        broker.commit(
            Commit(
                culprit.slot,
                1,
                [outcome],
                event.encode(told),
                [(headers.id, queue, message) for queue, message in sets_off.pushes],
                chord_parts=[] if sets_off.chord_part is None else [(headers.id, sets_off.chord_part)],
            )
        )


def _flags(messages: Sequence[bytes], culprit: Running) -> str:
    """What becomes of each message of the culprit's batch: see Broker.release."""
    jobs = list(map(jobs_of, messages))
    if len(culprit.jobs) > 1:
        return "".join(".!"[not set(culprit.jobs).isdisjoint(each)] for each in jobs)
    # A second copy of its message would keep it from being found alone.
    only = next(at for at, each in enumerate(jobs) if culprit.jobs[0] in each)
    return "".join("=" if at == only else "." for at in range(len(jobs)))


def jobs_of(message: bytes) -> tuple[str, ...]:
    """The ids of the jobs in a message; none where it holds none."""
    try:
        headers = wire.read_envelope(message).headers
        return bundle.ids_of(message, headers, wire.read_options(headers))
    except LeptonError:  # no job, so it did not run
        return ()
