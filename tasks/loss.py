"""The end of a worker whose device is lost: it gives everything back at once, and its supervisor starts it anew.

A process cannot open a device again that its toolkit has lost. What was in the launch that lost it comes back as a
suspect, to be run alone; only what loses a device while it runs alone counts an attempt, so that a job which breaks
every device it meets is a dead letter in the end, as one is that kills its workers.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from typing import Final

import structlog

from lepton_ai.errors import DeviceLost, Fenced
from tasks.heartbeat import Heartbeat
from tasks.runner import Running
from tasks.slots import Slots
from tasks.watchdog import jobs_of

__all__ = ["EXIT_CODE", "Loss"]

#: How the process ends: sysexits.h calls it an error of input or output.
EXIT_CODE: Final = 74
#: So long it may take to give things back; then the process ends as it is, and all it held is under suspicion.
_PATIENCE_S: Final = 10.0

log = structlog.get_logger()


class Loss:
    """Ends the process, once. Slots call it, each that finds the device lost."""

    def __init__(self, slots: Slots, heartbeat: Heartbeat, end: Callable[[int], object] = os._exit) -> None:
        self._slots = slots
        self._heartbeat = heartbeat
        self._end = end
        self._first = threading.Lock()

    def __call__(self, slot: int, broken: Running | None, error: DeviceLost) -> None:
        """The device was lost in a launch of a slot, which takes nothing more."""
        if self._first.acquire(blocking=False):
            # Not in the slot's own thread: the slots are waited for.
            threading.Thread(target=self._run, args=(slot, broken, error), name="loss", daemon=True).start()

    def _run(self, slot: int, broken: Running | None, error: DeviceLost) -> None:
        log.error("device_lost", device=self._slots.device, slot=slot, reason=error.message, ending="this process")
        last_resort = threading.Timer(_PATIENCE_S, self._end, (EXIT_CODE,))
        last_resort.daemon = True
        last_resort.start()
        is_alone = slot == self._slots.count
        try:
            self._slots.abandon()
            if not is_alone:
                self._suspect(slot, broken)
            self._heartbeat.lose(error.message, as_dead=is_alone)
        except Exception:  # the lease lapses, and others give back what is held
            log.exception("given_back_in_part")
        last_resort.cancel()
        self._end(EXIT_CODE)

    def _suspect(self, slot: int, broken: Running | None) -> None:
        """Gives back the batch in which it happened: what was in the launch as suspects, the rest as it was."""
        messages = self._slots.holding.get(slot, ())
        if not messages:
            return
        blamed = set(broken.jobs if broken is not None else ())
        flags = "".join(".!"[not blamed.isdisjoint(jobs_of(message))] for message in messages)
        broker = self._slots.connect("loss")
        with closing(broker.connection), suppress(Fenced):  # it has been given to another while our lease had lapsed
            broker.release(slot, messages, flags)
