"""Ctrl-C and its kin as facts that a loop looks at, not as exceptions at whatever line they come."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Signals"]

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """While open: what has been received, and a wait that a signal or the end of a child cuts short. Main thread only.

    (An exception out of a handler is lost where the interpreter happens to be in a callback, and leaves half of
    whatever it interrupts.)
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        """The signals that asked us to stop, in their order."""
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def wait(self, seconds: float) -> None:
        """Waits, at most so long, until a signal arrives or a child ends; one that came before counts."""
        if select.select([self._wakes], [], [], seconds)[0]:
            os.read(self._wakes, 4096)

    def check(self) -> None:
        """Raises KeyboardInterrupt where we were asked to stop."""
        if self.received:
            raise KeyboardInterrupt

    def __enter__(self) -> Signals:
        self._wakes, self._wakeup = os.pipe()
        os.set_blocking(self._wakes, False)
        os.set_blocking(self._wakeup, False)
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        for number in _STOPPING:
            if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT:  # nohup ignores SIGHUP
                self._before[number] = signal.signal(number, lambda number, _: self.received.append(number))
        self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._wakes)
        os.close(self._wakeup)
